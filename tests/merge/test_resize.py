"""Resized adapters: each update is the best of its rank, the stated error is the true one, PEFT reads the folder."""

from __future__ import annotations

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lofi
from files.families import adapted, family_model, logits, stir
from files.test_peft_parity import VARIETIES
from lofi.adapters.algebra import product_svd
from lofi.adapters.registry import adapter_of
from lofi.errors import LofiWarning, ProofError, RequestError
from lofi.evaluate.intervals import Interval
from lofi.files.adapter_folder import load_adapter, read_folder
from lofi.files.golden import make_golden, replay
from lofi.files.updates import low_rank_updates
from lofi.merge import rebuilt
from lofi.merge.resize import Goal, _smallest, resize_folder
from lofi.models.load import load_model
from merge.test_disk import make

peft = pytest.importorskip("peft")


def dense(update) -> list[torch.Tensor]:
    return [update.scale * b.double() @ a.double() for a, b in update.pairs]


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def saved(tmp_path, family="llama", **config):
    lofi.save_adapter(adapted(family, **config), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("variety", [name for name in VARIETIES if name != "tied embedding"])
def test_whatever_is_adapted_every_update_is_the_best_of_its_rank_and_peft_says_the_same(variety, tmp_path):
    family, config = VARIETIES[variety]
    adapter = saved(tmp_path, family, **config)
    report = resize_folder(adapter, tmp_path / "small", Goal(rank=2))
    old, new = (low_rank_updates(read_folder(folder)) for folder in (adapter, tmp_path / "small"))
    squares = 0.0
    for one, other in zip(old, new, strict=True):
        assert (one.name, other.rank) == (other.name, min(2, one.rank))
        for exact, kept in zip(dense(one), dense(other), strict=True):
            assert torch.allclose(kept, best(exact, 2), atol=1e-6)
            squares += float((exact - best(exact, 2)).square().sum())
    assert report.total.predicted == pytest.approx(math.sqrt(squares), rel=1e-9)
    assert report.total.measured == pytest.approx(report.total.predicted, rel=1e-6)
    model = family_model(family)
    load_adapter(model, tmp_path / "small")
    ours = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(family_model(family), str(tmp_path / "small")).eval())
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((ours - logits(adapted(family, **config))).abs().max()) > 1e-3


def test_what_is_no_update_is_carried_over_bit_for_bit(tmp_path):
    adapter = saved(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[7, 3])
    resize_folder(adapter, tmp_path / "small", Goal(rank=1))
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "small"))
    kept = [key for key in old if "lora_" not in key]
    assert len(kept) == 2 and all(torch.equal(old[key], new[key]) for key in kept)


def test_energy_gives_each_module_the_smallest_rank_that_holds_it_by_a_pattern_of_full_paths(tmp_path):
    adapter = saved(tmp_path, r=5, lora_alpha=10)
    resize_folder(adapter, tmp_path / "small", Goal(energy=0.8))
    exact = {update.name: dense(update)[0] for update in low_rank_updates(read_folder(adapter))}
    ranks = {}
    for update in low_rank_updates(read_folder(tmp_path / "small")):
        squares = torch.linalg.svdvals(exact[update.name]).square()
        held = squares.cumsum(0) / squares.sum()
        assert held[update.rank - 1] >= 0.8 and (update.rank == 1 or held[update.rank - 2] < 0.8)
        assert update.scale == 2.0  # alpha follows the rank, so the multiplier stays what it was
        ranks[update.path] = update.rank
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert len(set(ranks.values())) > 1
    assert config["rank_pattern"] == {path: rank for path, rank in ranks.items() if rank != config["r"]}
    assert config["lora_alpha"] == 2 * config["r"]
    model = family_model("llama")
    load_adapter(model, tmp_path / "small")
    assert {path: part.rank for path, part in adapter_of(model, "default").parts.items()} == ranks


def test_one_rank_for_all_fills_up_with_zeros_and_changes_nothing(tmp_path):
    adapter = saved(tmp_path, r=5, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3})
    resize_folder(adapter, tmp_path / "patterns", Goal(energy=0.8))
    resize_folder(adapter, tmp_path / "one", Goal(energy=0.8, same_rank=True))
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["lora_alpha"] == config["r"]
    said = []
    for folder in ("patterns", "one"):
        model = family_model("llama")
        load_adapter(model, tmp_path / folder)
        said.append(logits(model))
    assert float((said[0] - said[1]).abs().max()) < 1e-5


def test_all_of_the_energy_drops_only_directions_that_are_not_there(tmp_path):
    model = adapted("llama", r=5, target_modules=["q_proj"])
    with torch.no_grad():
        for part in adapter_of(model, "default").parts.values():
            part.lora_A[3:] = part.lora_A[:2]
    lofi.save_adapter(model, tmp_path / "adapter")
    report = resize_folder(tmp_path / "adapter", tmp_path / "small", Goal(energy=1.0))
    assert {cut.after for cut in report.cuts} == {3}
    assert report.total.measured < 1e-6 * report.total.norm
    small = family_model("llama")
    load_adapter(small, tmp_path / "small")
    assert float((logits(small) - logits(model)).abs().max()) < 1e-5


def test_rank_and_history_are_on_record_and_what_is_no_longer_true_is_not(tmp_path):
    model = adapted("llama")
    golden = make_golden(model)
    lofi.save_adapter(model, tmp_path / "adapter", record={"golden": golden, "figures": {"loss": 1.0}, "labels": None})
    report = resize_folder(tmp_path / "adapter", tmp_path / "small", Goal(rank=1))
    record = read_folder(tmp_path / "small").record
    assert "golden" not in record and "figures" not in record
    assert any("golden prompts were left out" in note for note in report.notes)
    assert record["base"] == read_folder(tmp_path / "adapter").record["base"]
    assert record["resized"]["asked"] == "to rank 1" and len(record["resized"]["sha256"]) == 64
    assert record["resized"]["measured_error"] == report.total.measured


def test_with_the_base_goldens_are_asked_again_and_the_outputs_are_compared(tmp_path):
    base, adapter = make(tmp_path, "llama")
    model = load_model(base)
    load_adapter(model, adapter)
    lofi.save_adapter(model, tmp_path / "with", record={"golden": make_golden(model, [[3, 4, 5], [9, 7]])})
    report = resize_folder(tmp_path / "with", tmp_path / "small", Goal(rank=2), model=base)
    assert report.verdict is not None and 0 < report.verdict.mean_logit_error < report.verdict.adapter_effect
    small = load_model(base)
    read = load_adapter(small, tmp_path / "small")
    assert [prompt["ids"] for prompt in read.record["golden"]["prompts"]] == [[3, 4, 5], [9, 7]]
    assert replay(small, read.record["golden"]) == []
    assert replay(model, read.record["golden"]) != []  # they are the small adapter's, not the old one's


def test_the_smallest_rank_that_keeps_enough_of_the_gain_is_found_and_every_figure_said(trained, lofi_tiny, tmp_path):
    adapter, data = trained
    report = resize_folder(adapter, tmp_path / "small", Goal(min_kept=0.5), model=lofi_tiny, data=data)
    kept = {one.rank: one.kept.value for one in report.tried}
    rank = {cut.after for cut in report.cuts}.pop()
    assert kept[rank] >= 0.5 and (rank == 1 or kept[rank - 1] < 0.5)
    assert report.verdict.share_kept.value == pytest.approx(kept[rank], abs=0.02)  # of the file, in bf16
    said = "\n".join(report.lines())
    assert all(f"rank {one.rank} keeps {one.kept.value:.1%}" in said for one in report.tried)
    assert "merged" not in said
    assert {row["who"] for row in report.to_dict()["results"]} == {"resized", "base", "adapter"}


def verdict_of(kept: float) -> SimpleNamespace:
    return SimpleNamespace(share_kept=Interval(kept, None, None))


@pytest.mark.parametrize(("needed", "found"), [(1, 1), (2, 2), (3, 3), (6, 6)])
def test_the_search_finds_the_smallest_rank_and_tries_each_at_most_once(tmp_path, needed, found):
    adapter = saved(tmp_path, r=7, target_modules=["q_proj"])
    asked = []

    def says(tensors):
        a = next(tensor for key, tensor in tensors.items() if "lora_A" in key)
        asked.append(int((a.abs().amax(1) > 0).sum()))
        return verdict_of(0.9 if asked[-1] >= needed else 0.1)

    updates = low_rank_updates(read_folder(adapter))
    svds = [[product_svd(a, b, update.scale) for a, b in update.pairs] for update in updates]
    live = SimpleNamespace(read=read_folder(adapter), with_tensors=says)
    rank, tried = _smallest(live, updates, svds, 0.8)
    assert rank == found and [one.rank for one in tried] == sorted(set(asked)) and len(asked) == len(set(asked)) <= 3
    with pytest.raises(ProofError, match=r"no rank below 7 keeps 95.0% of the gain \(.*rank 6 90.0%\)"):
        _smallest(live, updates, svds, 0.95)


def test_a_file_that_is_not_what_was_computed_is_refused(tmp_path, monkeypatch):
    adapter = saved(tmp_path)
    write = rebuilt.save_safetensors

    def spoil(path, tensors, **more):
        key = next(key for key in tensors if "lora_B" in key)
        write(path, {**tensors, key: tensors[key] * (1 + 1e-4)}, **more)

    monkeypatch.setattr(rebuilt, "save_safetensors", spoil)
    with pytest.raises(ProofError, match="away from the exact one, predicted was"):
        resize_folder(adapter, tmp_path / "small", Goal(rank=2))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({}, "none of --rank, --energy and --min-kept given"),
        ({"rank": 2, "energy": 0.9}, "--rank and --energy of"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy is 1.5, expected a share"),
        ({"min_kept": 0.0}, "min-kept is 0.0"),
    ],
)
def test_a_goal_that_cannot_be_is_one_sentence(goal, words):
    with pytest.raises(RequestError, match=words):
        Goal(**goal)


def test_what_cannot_be_resized_is_one_sentence(tmp_path):
    adapter = saved(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for output, goal, more, words in (
        (tmp_path / "small", Goal(rank=3), {}, "ranks up to 3, so rank 3 would change nothing"),
        (tmp_path / "small", Goal(min_kept=0.9), {}, "min-kept needs --model and --data"),
        (tmp_path / "small", Goal(rank=1), {"data": "rows.jsonl"}, "--data needs --model"),
        (tmp_path / "full", Goal(rank=1), {}, "exists; choose a new folder"),
        (adapter / "inside", Goal(rank=1), {}, "lies in the adapter"),
    ):
        with pytest.raises(RequestError, match=words):
            resize_folder(adapter, output, goal, **more)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_other_methods_are_refused_by_name(tmp_path):
    model = family_model("llama")
    lofi.add_adapter(model, lofi.LoraConfig(r=2, target_modules=["q_proj"]))
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    other = {"peft_type": "LOFI_BITFIT", "base_model_name_or_path": None, "inference_mode": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(RequestError, match=r"is a bitfit adapter \(LOFI_BITFIT\), which has no ranks to resize"):
        resize_folder(tmp_path / "adapter", tmp_path / "small", Goal(rank=1))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def test_dora_is_refused_for_its_update_is_no_product_of_factors(tmp_path):
    adapter = saved(tmp_path, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(RequestError, match="is a DoRA adapter, whose columns are rescaled"):
        resize_folder(adapter, tmp_path / "small", Goal(rank=1))


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_what_started_from_the_weights_comes_back_from_twice_the_rank(start, tmp_path):
    """A start that is subtracted again makes a file of rank 2R; a cut halves it, or drops nothing that is there."""
    model = adapted("llama", target_modules=["q_proj"], init_lora_weights=start)
    lofi.save_adapter(model, tmp_path / "adapter")
    assert {update.rank for update in low_rank_updates(read_folder(tmp_path / "adapter"))} == {6}
    report = resize_folder(tmp_path / "adapter", tmp_path / "small", Goal(rank=3))
    assert {cut.after for cut in report.cuts} == {3} and 0 < report.total.measured < report.total.norm
    whole = resize_folder(tmp_path / "adapter", tmp_path / "whole", Goal(energy=1.0))
    assert whole.total.measured < 1e-6 * whole.total.norm
    said = family_model("llama")
    load_adapter(said, tmp_path / "whole")
    assert float((logits(said) - logits(model)).abs().max()) < 1e-5


def test_without_lofi_json_the_result_says_that_the_base_is_not_on_record(tmp_path):
    adapter = saved(tmp_path)
    (adapter / "lofi.json").unlink()
    report = resize_folder(adapter, tmp_path / "small", Goal(rank=2))
    assert any("no lofi.json" in note for note in report.notes)
    model = family_model("llama")
    with pytest.warns(LofiWarning, match="cannot be proved"):
        load_adapter(model, tmp_path / "small")
