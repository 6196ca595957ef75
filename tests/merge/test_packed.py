"""Merging into nf4 and int8: what is written is what was rounded, it is judged, and refused where it loses too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lofi
from files.families import family_model, logits, stir
from lofi.errors import LofiError, ModelError, ProofError, RequestError
from lofi.files.adapter_folder import read_folder
from lofi.merge.calibration import MOST_BYTES, from_examples, grams, stages, written
from lofi.merge.disk import merge_folder
from lofi.merge.form import Form
from lofi.merge.packed import pack_merged, unpack
from lofi.merge.source import NAME, Source
from lofi.models.load import load_model
from lofi.quant.experts import FrozenExperts
from lofi.quant.linear import FrozenLinear, quantize_4bit
from merge.test_disk import digest, make


def held(model: nn.Module) -> dict[str, FrozenLinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, FrozenLinear)}


def source(base: Path, adapter: Path, kind: str | None = None) -> Source:
    return Source(base, read_folder(adapter), kind)


def packed_base(tmp_path: Path, family: str, kind: str, **config) -> tuple[Path, Path]:
    """A base folder in nf4 or int8, and an adapter that was trained on it."""
    family_model(family).save_pretrained(tmp_path / "dense")
    load_model(tmp_path / "dense", quantization=kind).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lofi.add_adapter(model, lofi.LoraConfig(**{"r": 3, "lora_alpha": 7, **config}))
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("rounding", ["nearest", "compensated", "stochastic"])
@pytest.mark.parametrize("into", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "t5"])
def test_the_folder_reads_back_to_the_bit_and_says_nearly_what_base_and_adapter_say(family, into, rounding, tmp_path):
    base, adapter = make(tmp_path, family, target_modules="all-linear", bias="lora_only")
    before = digest(base), digest(adapter)
    report = merge_folder(base, adapter, tmp_path / "out", form=Form(into, rounding))
    assert (digest(base), digest(adapter)) == before
    assert report.road.startswith(f"rounded {rounding} to {into}")
    model = source(base, adapter).open()
    expected = logits(model)
    calibration = written(model, []) if rounding == "compensated" else None
    made = held(pack_merged(model, NAME, into, rounding, calibration).model)
    back = load_model(tmp_path / "out")
    assert held(back).keys() == made.keys() and made
    if rounding != "compensated":  # whose calibration text depends on the prompts on record
        for path, module in held(back).items():
            assert torch.equal(module.weight, made[path].weight)
            assert all(torch.equal(b, made[path].get_buffer(n)) for n, b in module.named_buffers())
    limit = {"int8": 0.1, "nf4": 0.6}[into] * (1.5 if rounding == "stochastic" else 1)
    assert (logits(back) - expected).norm() < limit * expected.norm()
    assert (logits(load_model(base)) - expected).norm() > 0.9 * expected.norm()
    assert back.lofi_quantization == into and report.form == Form(into, rounding)


@pytest.mark.parametrize("into", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_codes_are_those_of_the_float32_sum_rounded_once(family, into, tmp_path):
    base, adapter = make(tmp_path, family, dtype=torch.bfloat16, target_modules="all-linear")
    model = source(base, adapter).open()
    linear = model.get_submodule("model.layers.1.mlp.down_proj" if family == "llama" else "transformer.h.1.mlp.c_proj")
    part = linear.adapters[NAME]
    stored = linear.weight.float() if family == "llama" else linear.weight.float().t()
    weight = stored + 7 / 3 * (part.lora_B @ part.lora_A)  # (O, I), I % 64 != 0
    path = next(p for p, m in model.named_modules() if m is linear)
    found = held(pack_merged(model, NAME, into, "nearest", None).model)[path]
    if into == "nf4":
        assert torch.equal(found.stored.codes.view(-1), quantize_4bit(weight.detach()).codes.view(-1))
    else:
        assert torch.equal(found.SCB, weight.detach().abs().amax(1))
    assert found.dense_dtype == torch.bfloat16


@pytest.mark.parametrize("into", ["nf4", "int8"])
def test_bitsandbytes_reads_the_same_weights(into, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base, adapter = make(tmp_path, "llama", target_modules="all-linear", dtype=torch.bfloat16)
    merge_folder(base, adapter, tmp_path / "out", form=Form(into, "compensated"))
    from transformers import AutoModelForCausalLM

    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), held(load_model(tmp_path / "out"))
    for path, module in ours.items():
        linear = theirs.get_submodule(path)
        if into == "nf4":
            weight = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert torch.equal(weight.to(torch.bfloat16), module.dense_weight(torch.bfloat16))
        else:
            assert torch.equal(linear.weight.data, module.weight) and torch.equal(linear.weight.SCB, module.SCB)


@pytest.mark.parametrize("into", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantized_base_is_merged_into_every_form(family, kind, into, tmp_path):
    base, adapter = packed_base(tmp_path, family, kind, target_modules="all-linear")
    before = digest(base)
    report = merge_folder(base, adapter, tmp_path / "out", form=Form(into))
    assert digest(base) == before
    expected = logits(source(base, adapter, kind).open())
    back = load_model(tmp_path / "out")
    assert back.lofi_quantization == (None if into == "dense" else into)
    limit = {"dense": 0.08, "int8": 0.12, "nf4": 0.6}[into]
    assert (logits(back) - expected).norm() < limit * expected.norm()
    if into == "dense":
        assert f"onto the dequantized weights of an {kind} base" in report.road
        assert type(back) is type(family_model(family)) and not held(back)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "quantization_config" not in config
        assert (
            load_file(tmp_path / "out" / "model.safetensors").keys()
            == load_file(tmp_path / "dense" / "model.safetensors").keys()
        )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_the_adapter_leaves_alone_keeps_its_codes(kind, tmp_path):
    base, adapter = packed_base(tmp_path, "llama", kind, target_modules=["q_proj"])
    merge_folder(base, adapter, tmp_path / "out", form=Form(kind, "compensated"))
    was, now = held(load_model(base)), held(load_model(tmp_path / "out"))
    assert all(torch.equal(was[p].weight, now[p].weight) != ("q_proj" in p) for p in was)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_biases_norms_heads_and_copies_are_merged_beside_the_codes(kind, tmp_path):
    base, adapter = make(
        tmp_path, "gpt2", target_modules=["c_attn"], bias="all", modules_to_save=["transformer.h.1.mlp.c_fc"]
    )
    report = merge_folder(base, adapter, tmp_path / "out", form=Form(kind, "nearest"))
    model, back = source(base, adapter).open(), load_model(tmp_path / "out")
    attention, copied = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"
    assert torch.equal(back.get_submodule(attention).bias, model.get_submodule(attention).adapters[NAME].bias)
    assert torch.equal(back.get_parameter(f"{copied}.weight"), model.get_submodule(copied).adapters[NAME].copy.weight)
    assert not torch.equal(back.transformer.ln_f.bias, load_model(base).transformer.ln_f.bias)
    assert any("trained in full stay dense" in note for note in report.notes)
    assert (logits(back) - logits(model)).norm() < 0.6 * logits(model).norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("held_as", [None, "nf4"])
def test_experts_are_merged_and_rounded_to_nearest_which_is_said(held_as, kind, tmp_path):
    config = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    base, adapter = (packed_base if held_as else make)(tmp_path, "mixtral", *filter(None, [held_as]), **config)
    report = merge_folder(base, adapter, tmp_path / "out", form=Form(kind, "compensated"))
    assert any("experts of 2 layers were rounded to nearest" in note for note in report.notes)
    back, expected = load_model(tmp_path / "out"), logits(source(base, adapter, held_as).open())
    experts = [m for m in back.modules() if isinstance(m, FrozenExperts)]
    assert len(experts) == 2 and all("gate_up_proj" in m.packed_shapes for m in experts)
    assert (logits(back) - expected).norm() < (0.15 if kind == "int8" else 0.7) * expected.norm()
    merge_folder(base, adapter, tmp_path / "plain")
    assert (logits(load_model(tmp_path / "plain")) - expected).norm() < 0.02 * expected.norm()


# ---- calibration


def test_layers_with_one_input_share_one_matrix_which_is_that_of_their_inputs(tmp_path):
    base, adapter = make(tmp_path, "llama", target_modules="all-linear")
    model = source(base, adapter).open()
    paths = [p for p, m in model.named_modules() if hasattr(m, "adapters")]
    calibration = written(model, [])
    steps = stages(model, paths, calibration)
    assert [len(stage) for stage in steps] == [4, 4] and sorted(p for s in steps for g in s for p in g) == sorted(paths)
    assert [g[0].rpartition(".")[2] for g in steps[0]] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    found = grams(model, steps[1], calibration)
    inputs = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for row in calibration.rows:
            model(**row)
    handle.remove()
    x = torch.cat(inputs)
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], x.t() @ x / len(x), rtol=1e-3, atol=1e-6)
    assert found["model.layers.1.self_attn.q_proj"] is not found["model.layers.1.self_attn.o_proj"]
    assert not any(m._forward_pre_hooks for m in model.modules()) and MOST_BYTES == 1 << 30


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "gpt2"])
def test_every_family_is_calibrated_without_data_and_left_as_it_was(family):
    model = family_model(family)
    state = torch.random.get_rng_state()
    calibration = written(model, [[5, 9, 12]])
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    again = written(model, [[5, 9, 12]])
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(calibration.rows, again.rows, strict=True))
    assert len(calibration.rows) == 64 and str(calibration.tokens // 1000) in str(calibration)
    speaks = {"bert": "random ids", "t5": "answers that the model wrote itself"}
    assert calibration.source == speaks.get(family, "text that the model wrote itself")
    assert (calibration.rows[1]["input_ids"][0, :3].tolist() == [5, 9, 12]) == (family != "bert")
    assert all(("decoder_input_ids" in row) == (family == "t5") for row in calibration.rows)
    assert all(row["input_ids"].shape[1] <= 96 + 3 for row in calibration.rows)


def test_rows_that_calibrate_are_not_judged_on(trained, tmp_path, lofi_tiny):
    adapter, data = trained
    report = merge_folder(lofi_tiny, adapter, tmp_path / "out", form=Form("int8", "compensated"), data=data)
    assert report.verdict.examples == 12 and "set apart" in report.road
    plain = merge_folder(lofi_tiny, adapter, tmp_path / "plain", form=Form("int8", "nearest"), data=data)
    assert plain.verdict.examples == 16


# ---- choosing


def test_auto_measures_both_roundings_and_writes_the_better(trained, tmp_path, lofi_tiny):
    adapter, data = trained
    report = merge_folder(lofi_tiny, adapter, tmp_path / "out", form=Form("nf4"), data=data)
    assert [str(a.form) for a in report.alternatives] == ["nf4, nearest", "nf4, compensated"]
    shares = {a.form.rounding: a.verdict.share_kept.value for a in report.alternatives}
    assert report.form.rounding == max(shares, key=shares.get)
    kept = report.verdict.share_kept
    assert kept is not None and kept.value == pytest.approx(max(shares.values()), abs=0.02)
    assert report.recommendation is not None and "recommended: nf4" in report.recommendation
    rows = [row for row in report.to_dict()["results"] if row["who"] == "nf4, compensated"]
    assert {row["metric"] for row in rows} == {"share_kept", "kl", "top1_agreement", "weight_bytes"}
    assert json.loads((tmp_path / "out" / "lofi_merge.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_compare_measures_every_form_and_recommends_the_lightest_that_keeps_enough(
    trained,
    tmp_path,
    lofi_tiny,
):
    adapter, data = trained
    report = merge_folder(lofi_tiny, adapter, tmp_path / "out", data=data, compare=True, min_kept=0.5)
    told = {str(a.form): a for a in report.alternatives}
    assert list(told) == ["dense", "int8, nearest", "int8, compensated", "nf4, nearest", "nf4, compensated"]
    weights = [a.weight_bytes for a in told.values()]
    assert weights[0] > weights[1] == weights[2] > weights[3] == weights[4]
    assert report.form == Form() and not held(load_model(tmp_path / "out"))
    assert report.recommendation is not None and "recommended: nf4" in report.recommendation
    assert any(line.startswith("  int8, compensated: keeps ") for line in report.lines())


def test_an_adapter_of_a_quantized_base_can_go_onto_either_weights_and_both_are_judged(tmp_path, lofi_tiny, trained):
    _, data = trained
    model = load_model(lofi_tiny, quantization="nf4")
    lofi.add_adapter(model, lofi.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"]))
    from lofi.data.prepare import prepare
    from lofi.data.records import load_records
    from lofi.models.load import load_tokenizer

    examples = prepare(load_records(data), load_tokenizer(lofi_tiny)).examples
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for example in examples[:8] * 3:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    lofi.save_adapter(model, tmp_path / "q")
    record = json.loads((tmp_path / "q" / "lofi.json").read_text())
    assert record["base"]["quantization"] == "nf4"
    report = merge_folder(lofi_tiny, tmp_path / "q", tmp_path / "original", data=data)
    assert report.form.onto == "original" and "trained on an nf4 base" in report.notes[0]
    onto = {a.form.onto: a.verdict.share_kept.value for a in report.alternatives}
    assert set(onto) == {"original", "dequantized"} and onto["dequantized"] == pytest.approx(1, abs=0.03)
    assert any("keeps" in note and "onto the" in note for note in report.notes[1:])
    other = merge_folder(lofi_tiny, tmp_path / "q", tmp_path / "deq", data=data, form=Form(onto="dequantized"))
    assert other.verdict.share_kept.value == pytest.approx(onto["dequantized"], abs=0.01)
    weight = load_model(lofi_tiny, quantization="nf4").model.layers[0].mlp.down_proj.dense_weight()
    assert torch.equal(load_model(tmp_path / "deq").model.layers[0].mlp.down_proj.weight, weight)


# ---- refusals


def test_a_form_that_keeps_too_little_is_refused_and_nothing_is_written(trained, tmp_path, lofi_tiny):
    adapter, data = trained
    before = digest(tmp_path)
    with pytest.raises(ProofError, match=r"less than min_kept 0\.9999"):
        merge_folder(lofi_tiny, adapter, tmp_path / "out", form=Form("nf4", "stochastic"), data=data, min_kept=0.9999)
    assert digest(tmp_path) == before and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"into": "nf44"}, "into is 'nf44', which a merge does not know; did you mean nf4"),
        ({"into": "gguf"}, "use one of dense, nf4, int8"),
        ({"into": "nf4", "rounding": "stocastic"}, "did you mean stochastic"),
        ({"rounding": "nearest"}, "a dense merge has one rounding"),
        ({"onto": "orignal"}, "did you mean original"),
    ],
)
def test_a_word_that_is_not_known_is_one_sentence(words, said):
    with pytest.raises(RequestError, match=said):
        Form(**words)


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path):
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    with pytest.raises(RequestError, match="was not trained on an nf4 or int8 base"):
        merge_folder(base, adapter, tmp_path / "out", form=Form(onto="dequantized"))
    (tmp_path / "q").mkdir()
    packed, adapter = packed_base(tmp_path / "q", "llama", "nf4", target_modules=["q_proj"])
    with pytest.raises(RequestError, match="of which the originals are gone"):
        merge_folder(packed, adapter, tmp_path / "out", form=Form("nf4", onto="original"))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_linear_to_quantize_is_refused(tmp_path):
    family_model("llama", num_hidden_layers=0).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["lm_head"]))
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="no linear layer to quantize"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", form=Form("nf4", "nearest"))
    assert not (tmp_path / "out").exists()


def test_a_full_model_is_unpacked_in_place(tmp_path):
    family_model("gpt2").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", quantization="nf4")
    said = logits(model)
    plain = unpack(model)
    assert plain is model and not held(model) and type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert (logits(plain) - said).norm() < 0.05 * said.norm()
    assert model.lofi_quantization is None and not getattr(model, "is_quantized", False)
    plain.save_pretrained(tmp_path / "out")
    assert load_model(tmp_path / "out").lofi_quantization is None


def test_calibrating_on_prepared_examples_takes_their_tokens():
    class Example:
        input_ids, labels = [5, 6, 7], [-100, 6, 7]

    rows = from_examples(family_model("llama"), [Example(), Example()], "here").rows
    assert [row["input_ids"].tolist() for row in rows] == [[[5, 6, 7]]] * 2 and set(rows[0]) == {"input_ids"}
    assert issubclass(ProofError, LofiError)
