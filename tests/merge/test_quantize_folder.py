"""Quantizing folders: the format others read, the cost stated, nothing given changed, nothing half-written left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import lofi
from files.families import family_model, logits
from lofi.errors import LofiError, ModelError, ProofError, RecipeError, RequestError
from lofi.files.fingerprint import base_fingerprint
from lofi.merge import quantize_folder as room
from lofi.merge.quantize_folder import quantize_folder, weight_errors
from lofi.merge.quantize_report import FILE
from lofi.models.load import load_model


def made(tmp_path: Path, family: str = "llama", *, dtype=torch.bfloat16, shard: str = "50GB", **changes) -> Path:
    family_model(family, dtype=dtype, **changes).save_pretrained(tmp_path / "base", max_shard_size=shard)
    return tmp_path / "base"


def digest(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".lofi-" in path.name]


@pytest.mark.parametrize(
    ("family", "quantization", "changes"),
    [
        ("llama", "nf4", {}),
        ("llama", "int8", {"dtype": torch.float32}),
        ("llama_tied", "nf4", {"dtype": torch.float16}),
        ("gpt2", "nf4", {"dtype": torch.float32}),
        ("gpt2", "int8", {}),
        ("mixtral", "nf4", {"dtype": torch.float32}),
        ("t5", "int8", {"dtype": torch.float32}),
        ("bert", "nf4", {"dtype": torch.float32}),
        ("llama", "nf4", {"shard": "6KB"}),
    ],
)
def test_the_folder_is_the_model_that_loading_it_quantized_gives(family, quantization, changes, tmp_path):
    base = made(tmp_path, family, **changes)
    before = digest(base)
    report = quantize_folder(base, tmp_path / "out", quantization)
    assert digest(base) == before and not leftovers(tmp_path)
    written, expected = load_model(tmp_path / "out"), load_model(base, quantization=quantization)
    assert written.lofi_quantization == quantization
    ours, theirs = written.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert base_fingerprint(written)["digest"] == base_fingerprint(load_model(base))["digest"]
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (base, tmp_path / "out")]
    assert [report.bytes_before, report.bytes_after] == sizes
    assert json.loads((tmp_path / "out" / FILE).read_text()) == json.loads(json.dumps(report.to_dict()))


def test_the_errors_are_those_of_the_weights_and_of_the_answers(tmp_path):
    base = made(tmp_path, dtype=torch.float32)
    report = quantize_folder(base, tmp_path / "out", "nf4")
    dense, packed = load_model(base), load_model(tmp_path / "out")
    for path, error in report.errors.items():
        weight = dense.get_parameter(path)
        back = packed.get_submodule(path.removesuffix(".weight")).dense_weight(torch.float32)
        assert error == pytest.approx(float((back - weight).detach().norm() / weight.detach().norm()), rel=1e-5)
        assert 0.05 < error < 0.15  # NF4 on weights like these: about 0.09
    assert list(report.errors.values()) == sorted(report.errors.values(), reverse=True)
    assert len(report.errors) == report.packed.packed_weights == 14
    moved = float((logits(packed) - logits(dense)).abs().mean())
    assert 0.3 * moved < report.cost.mean_logit_error < 3 * moved  # other probes, the same kind of difference
    assert 0 < report.cost.mean_logit_error < report.cost.max_logit_error
    assert 0.3 < report.cost.top1_agreement <= 1 and report.cost.kl > 0
    assert "next token: " in "\n".join(report.lines())


def test_a_weight_stored_the_other_way_round_is_compared_the_right_way(tmp_path):
    base = made(tmp_path, "gpt2", dtype=torch.float32)
    errors = weight_errors(load_model(base), load_model(base, quantization="int8"))
    assert len(errors) == 8 and all(0 < error < 0.02 for error in errors.values())


def test_eight_bits_err_less_than_four_and_double_quantization_costs_little(tmp_path):
    base = made(tmp_path, dtype=torch.float32)
    cost, size = {}, {}
    for name, config in {
        "int8": lofi.Int8Config(), "single": lofi.NF4Config(double_quant=False), "double": lofi.NF4Config(),
    }.items():  # fmt: skip
        report = quantize_folder(base, tmp_path / name, config)
        cost[name] = sum(report.errors.values()) / len(report.errors)
        size[name] = report.packed.bits
    assert cost["int8"] < 0.2 * cost["single"]
    assert cost["single"] == pytest.approx(cost["double"], rel=0.02)
    assert size["double"] < size["single"] < 8 < size["int8"]
    assert size["single"] == pytest.approx(4.5, rel=0.01)  # 32 bits for each 64 weights; a short block costs as much


def test_what_stays_dense_is_what_was_asked_for_and_what_always_does(tmp_path):
    report = quantize_folder(made(tmp_path), tmp_path / "out", lofi.NF4Config(skip_modules=["down_proj"]))
    assert report.packed.dense_linears == {"embed_tokens": 1, "down_proj": 2, "lm_head": 1}
    assert quantize_folder(tmp_path / "base", tmp_path / "out", "nf4").packed.packed_weights == 14  # it may be replaced


def test_the_loss_of_both_models_stands_in_the_report_where_rows_are_given(tmp_path, lofi_tiny):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"{i} and {i}"}) + "\n" for i in range(6)))
    report = quantize_folder(lofi_tiny, tmp_path / "out", "int8", data=rows)
    assert report.cost.losses.keys() == {"dense", "int8"} and report.cost.examples == 6
    dense, packed = (loss.value for loss in report.cost.losses.values())
    assert dense == pytest.approx(packed, rel=0.02) and dense != packed
    assert {row["who"] for row in report.rows() if row["metric"] == "loss"} == {"dense", "int8"}


@pytest.mark.parametrize(
    ("quantization", "words"),
    [("nf5", "did you mean nf4"), ("fp4", "only read"), (lofi.NF4Config(skip_modules=["q_porj"]), "q_proj")],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(quantization, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        quantize_folder(made(tmp_path), tmp_path / "out", quantization)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_what_is_quantized_already_is_refused(tmp_path):
    quantize_folder(made(tmp_path), tmp_path / "out", "nf4")
    with pytest.raises(ModelError, match="out holds nf4-quantized weights already; give the dense model"):
        quantize_folder(tmp_path / "out", tmp_path / "twice", "nf4")
    assert not (tmp_path / "twice").exists()


def test_the_output_is_never_something_else(tmp_path):
    base = made(tmp_path)
    for output in (base, base / "inner", tmp_path):
        with pytest.raises(RequestError, match="choose another output"):
            quantize_folder(base, output, "nf4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(LofiError, match=r"holds thesis\.tex, which is no part of a quantized model"):
        quantize_folder(base, tmp_path / "out", "nf4")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_an_impossible_option_is_refused_when_it_is_made():
    with pytest.raises(RecipeError, match=r"threshold is -1.0, expected the magnitude"):
        lofi.Int8Config(threshold=-1.0)
    with pytest.raises(RecipeError, match="compute_dtype is 'int4'"):
        lofi.NF4Config(compute_dtype="int4")


def test_a_file_that_does_not_read_back_takes_no_place(tmp_path, monkeypatch):
    base = made(tmp_path)
    quantize_folder(base, tmp_path / "out", "nf4")
    before = digest(tmp_path / "out")
    real = room._open

    def damaged(folder):
        model = real(folder)
        if model.lofi_quantization is not None:  # as a disk that lost a bit would give it back
            code = model.model.layers[1].mlp.up_proj.weight
            with torch.no_grad():
                code[3] ^= 1
        return model

    monkeypatch.setattr(room, "_open", damaged)
    with pytest.raises(ProofError, match=r"layers\.1\.mlp\.up_proj\.weight does not read back"):
        quantize_folder(base, tmp_path / "out", "nf4")
    assert digest(tmp_path / "out") == before and not leftovers(tmp_path)


def test_a_model_that_answers_with_nan_takes_no_place(tmp_path, monkeypatch):
    real, asked = room.measure, []

    def measured(model, probes):
        said = real(model, probes)
        asked.append(model)
        if len(asked) == 2:
            said.logits[0, 0] = float("nan")
        return said

    monkeypatch.setattr(room, "measure", measured)
    with pytest.raises(ProofError, match="logits are not finite"):
        quantize_folder(made(tmp_path), tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_a_base_without_the_head_it_claims_is_not_written_with_a_random_one(tmp_path):
    from transformers import AutoModel

    base = made(tmp_path, "bert", dtype=torch.float32)
    AutoModel.from_pretrained(base).save_pretrained(tmp_path / "body")
    config = json.loads((tmp_path / "body" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "body" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks classifier\.bias"):
        quantize_folder(tmp_path / "body", tmp_path / "out", "nf4")
