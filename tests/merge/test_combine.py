"""Combined adapters say what all of them active say, their stated error is the true one, and PEFT reads the folder."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

import lofi
from files.families import family_model, logits, stir
from lofi.adapters.switch import set_adapter
from lofi.errors import AdapterFileError, LofiWarning, ProofError, RequestError
from lofi.files.adapter_folder import load_adapter, read_folder
from lofi.files.updates import low_rank_updates
from lofi.merge.combine import Mix, combine_folders

peft = pytest.importorskip("peft")

# two adapters of one base -> (family, one's config, the other's)
DIFFERENT = {
    "ranks and alphas": ("llama", {"r": 3, "lora_alpha": 7}, {"r": 5, "lora_alpha": 4}),
    "targets": ("llama", {"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "down_proj"]}),
    "rsLoRA": ("qwen3", {"use_rslora": True, "r": 3}, {"r": 2}),
    "patterns": ("llama", {"rank_pattern": {"v_proj": 6}}, {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
    "layers": ("llama", {"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"]}, {"target_modules": ["c_attn", "c_proj"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"]}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts in one": (
        "mixtral",
        {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["v_proj"]},
    ),
}  # fmt: skip


def two(tmp_path, family="llama", one=None, other=None, *, base_seed: int = 0, second_seed: int | None = None):
    """Folders of two adapters, each stirred on its own."""
    for name, config, seed in (("a", one or {}, base_seed), ("b", other or {}, second_seed or base_seed)):
        model = family_model(family, seed=seed)
        lofi.add_adapter(model, lofi.LoraConfig(**{"r": 3, "lora_alpha": 7, **config}), name)
        stir(model, name, seed=ord(name))
        lofi.save_adapter(model, tmp_path / name, name)
    return {"a": tmp_path / "a", "b": tmp_path / "b"}


def both_active(family, adapters) -> torch.Tensor:
    model = family_model(family)
    for name, folder in adapters.items():
        load_adapter(model, folder, name)
    set_adapter(model, list(adapters))
    return logits(model)


def said_by(family, folder) -> torch.Tensor:
    model = family_model(family)
    load_adapter(model, folder)
    return logits(model)


def deltas(folder) -> dict[tuple[str, int], torch.Tensor]:
    """Every update in full, by name and number of the expert."""
    found = {}
    for update in low_rank_updates(read_folder(folder)):
        for number, (a, b) in enumerate(update.pairs):
            found[update.name, number] = update.scale * b.double() @ a.double()
    return found


@pytest.mark.parametrize("difference", DIFFERENT)
def test_concatenated_they_say_what_both_active_say_in_lofi_and_in_peft(difference, tmp_path):
    family, one, other = DIFFERENT[difference]
    adapters = two(tmp_path, family, one, other)
    report = combine_folders(adapters, tmp_path / "sum")
    assert report.total.measured <= 1e-6 * report.total.norm and report.total.predicted == 0.0
    ours = said_by(family, tmp_path / "sum")
    assert float((ours - both_active(family, adapters)).abs().max()) < 2e-5
    assert float((ours - said_by(family, adapters["a"])).abs().max()) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(family_model(family), str(tmp_path / "sum")).eval())
    assert float((ours - theirs).abs().max()) < 1e-5


def test_weights_are_those_of_the_updates_and_may_be_negative(tmp_path):
    adapters = two(tmp_path, "llama", {"r": 2}, {"target_modules": ["q_proj", "o_proj"]})
    combine_folders(adapters, tmp_path / "sum", Mix(weights=[0.7, -0.3]))
    a, b, total = (deltas(folder) for folder in (*adapters.values(), tmp_path / "sum"))
    for key, found in total.items():
        wanted = 0.7 * a.get(key, torch.zeros(())) - 0.3 * b.get(key, torch.zeros(()))
        assert torch.allclose(found, wanted.expand_as(found), atol=1e-6)


@pytest.mark.parametrize(("mix", "rank"), [(Mix(how="linear"), 3), (Mix(how="svd", rank=2), 2)])
def test_the_cut_sum_is_the_best_of_its_rank_and_states_its_distance_to_the_exact_one(mix, rank, tmp_path):
    adapters = two(tmp_path, "llama", {"r": 3}, {"r": 2})
    report = combine_folders(adapters, tmp_path / "sum", mix)
    a, b, total = (deltas(folder) for folder in (*adapters.values(), tmp_path / "sum"))
    squares = 0.0
    for key, found in total.items():
        u, s, vh = torch.linalg.svd(a[key] + b[key], full_matrices=False)
        assert torch.allclose(found, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-6)
        squares += float(s[rank:].square().sum())
    assert report.total.predicted == pytest.approx(math.sqrt(squares), rel=1e-9)
    assert report.total.measured == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert {cut.after for cut in report.cuts} == {rank}
    stored = read_folder(tmp_path / "sum").record["combined"]
    assert (stored["how"], stored["measured_error"]) == (mix.how, report.total.measured)


def test_there_are_no_cross_terms_where_pefts_linear_has_them(tmp_path):
    adapters = two(tmp_path)
    combine_folders(adapters, tmp_path / "sum", Mix(how="svd", rank=6))  # all of the sum's rank: exact
    wanted = both_active("llama", adapters)
    assert float((said_by("llama", tmp_path / "sum") - wanted).abs().max()) < 2e-5
    model = peft.PeftModel.from_pretrained(family_model("llama"), str(adapters["a"]), adapter_name="a")
    model.load_adapter(str(adapters["b"]), "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    assert float((logits(model.eval()) - wanted).abs().max()) > 0.1


def test_three_adapters_add_up_and_their_origins_are_on_record(tmp_path):
    adapters = two(tmp_path)
    adapters["c"] = two(tmp_path / "more", "llama", {"r": 1}, {"r": 4})["b"]
    report = combine_folders(adapters, tmp_path / "sum")
    assert {cut.after for cut in report.cuts} == {10}
    parts = read_folder(tmp_path / "sum").record["combined"]["parts"]
    assert [part["weight"] for part in parts] == [1.0, 1.0, 1.0]
    assert len({part["sha256"] for part in parts}) == 3
    assert float((said_by("llama", tmp_path / "sum") - both_active("llama", adapters)).abs().max()) < 2e-5


def test_what_is_trained_in_full_must_be_the_same_in_all(tmp_path):
    with_head = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapters = two(tmp_path, "llama", with_head, with_head)
    with pytest.raises(RequestError, match=r"lm_head.weight is trained in full and differs between a and b"):
        combine_folders(adapters, tmp_path / "sum")
    lone = two(tmp_path / "lone", "llama", with_head, {"target_modules": ["q_proj"]})
    with pytest.raises(RequestError, match=r"b has no .*lm_head.weight"):
        combine_folders(lone, tmp_path / "sum")
    combine_folders({"a": adapters["a"], "again": adapters["a"]}, tmp_path / "sum")
    rows = {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}
    with pytest.raises(RequestError, match="token_adapter"):
        combine_folders(two(tmp_path / "rows", "llama", rows, rows), tmp_path / "rows_sum")


def test_adapters_of_another_base_or_task_are_refused(tmp_path):
    with pytest.raises(ProofError, match="a and b were trained on different bases"):
        combine_folders(two(tmp_path, second_seed=8), tmp_path / "sum")
    adapters = two(tmp_path / "task")
    config = json.loads((adapters["b"] / "adapter_config.json").read_text())
    (adapters["b"] / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_2_SEQ_LM"}))
    with pytest.raises(RequestError, match=r"do not share one task .*a: CAUSAL_LM, b: SEQ_2_SEQ_LM"):
        combine_folders(adapters, tmp_path / "sum")


def test_an_adapter_without_lofi_json_is_taken_with_a_warning_but_not_with_other_shapes(tmp_path):
    adapters = two(tmp_path)
    (adapters["b"] / "lofi.json").unlink()
    with pytest.warns(LofiWarning, match="cannot be proved"):
        combine_folders(adapters, tmp_path / "sum")
    assert read_folder(tmp_path / "sum").record["base"] == read_folder(adapters["a"]).record["base"]
    wide = two(tmp_path / "wide", "qwen2", {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]})
    other = two(tmp_path / "other", "phi", {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]})
    (other["b"] / "lofi.json").unlink()
    with pytest.raises(ProofError, match="24 x 24 and 32 x 32"), pytest.warns(LofiWarning):
        combine_folders({"a": wide["a"], "b": other["b"]}, tmp_path / "mixed")


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"how": "lineer"}, "did you mean linear"),
        ({"how": "ties"}, "expected one of concat, linear, svd"),
        ({"how": "svd"}, "svd needs a rank"),
        ({"rank": 4}, "rank goes with svd, but how is concat"),
        ({"how": "svd", "rank": 0}, "rank is 0"),
        ({"weights": [1.0, 0.0]}, "weights holds 0.0"),
        ({"weights": [float("nan"), 1.0]}, "weights holds nan"),
    ],
)
def test_a_mix_that_cannot_be_is_one_sentence(mix, words):
    with pytest.raises(RequestError, match=words):
        Mix(**mix)


def test_what_cannot_be_combined_is_one_sentence(tmp_path):
    adapters = two(tmp_path)
    with pytest.raises(RequestError, match="1 adapter given, but combining takes two or more"):
        combine_folders({"a": adapters["a"]}, tmp_path / "sum")
    with pytest.raises(RequestError, match="3 weights for 2 adapters"):
        combine_folders(adapters, tmp_path / "sum", Mix(weights=[1, 2, 3]))
    with pytest.raises(AdapterFileError, match="does not exist"):
        combine_folders({**adapters, "c": tmp_path / "nowhere"}, tmp_path / "sum")
    with pytest.raises(RequestError, match="exists; choose a new folder"):
        combine_folders(adapters, adapters["a"])
    assert not (tmp_path / "sum").exists()
