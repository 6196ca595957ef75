"""A GGUF file is the model it was written from: to transformers' own reader, to its proofs, and in what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lofi.errors import ModelError, ProofError, RequestError
from lofi.export import gguf_model
from lofi.export.gguf_file import decoded, encoded, read
from lofi.export.gguf_model import write_model_gguf
from lofi.export.gguf_names import Heads, turned
from lofi.export.gguf_numbers import llama3_divisors
from lofi.export.gguf_proof import restored
from lofi.models.load import load_model
from tiny_gguf import ROWS, tiny

pytest.importorskip("gguf", reason='the gguf package is missing; pip install "lofi[export]"')
IDS = torch.arange(3, 43).reshape(2, 20)


def edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "llama-tied-biased", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi3"])
def test_transformers_reads_the_file_as_the_same_model(family, tmp_path):
    folder = tiny(family, tmp_path / "m")
    report = write_model_gguf(folder, tmp_path / "out" / "m.gguf", dtype="f32")
    assert report.rounding.rounded == 0 and report.agreement.max_logit_error < 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="m.gguf", config=AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    torch.testing.assert_close(logits(theirs.eval()), logits(load_model(folder, dtype="float32")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma", "gpt2-untied"])
def test_families_that_transformers_does_not_read_are_proved_from_the_file(family, tmp_path):
    report = write_model_gguf(tiny(family, tmp_path / "m"), tmp_path / "m.gguf", dtype="f32")
    assert report.rounding.rounded == 0 and report.agreement.max_logit_error < 1e-4 and report.agreement.spread > 0.1


def test_neighbouring_rows_of_a_head_are_the_two_halves_of_a_rotary_pair():
    rows = torch.arange(12.0).reshape(12, 1).repeat(1, 3)  # two heads of six
    got = turned(rows, "interleave_q", Heads(2, 1))[:, 0].tolist()
    assert got == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(restored(turned(rows, "interleave_k", Heads(9, 2)), "interleave_k", Heads(9, 2)), rows)


@pytest.mark.parametrize(
    ("family", "named"), [("llama", "attn_[qk]"), ("gemma2", "norm"), ("gpt2", "attn_output"), ("phi3", None)]
)
def test_a_turn_that_is_left_out_is_noticed(family, named, tmp_path, monkeypatch):
    folder = tiny(family, tmp_path / "m")
    (tmp_path / "m.gguf").write_text("before")

    def only_what_shapes_need(tensor, turn, heads):
        return tensor.t() if turn == "transpose" and tensor.shape[0] != tensor.shape[1] else tensor

    monkeypatch.setattr(gguf_model, "turned", only_what_shapes_need)
    if named is None:  # phi3 needs no turn, so nothing is wrong
        assert write_model_gguf(folder, tmp_path / "other.gguf", dtype="f32").rounding.rounded == 0
        return
    with pytest.raises(ProofError, match=rf"{named}\S* does not read back"):
        write_model_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    assert (tmp_path / "m.gguf").read_text() == "before" and len(list(tmp_path.glob(".*"))) == 0


def test_a_sharded_bfloat16_folder_is_written_bit_for_bit(tmp_path):
    whole = tiny("llama", tmp_path / "whole", dtype=torch.bfloat16)
    parts = tiny("llama", tmp_path / "parts", dtype=torch.bfloat16, shard="20KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    one, two = (write_model_gguf(f, tmp_path / f"{f.name}.gguf", dtype="bf16", name="same") for f in (whole, parts))
    assert one.rounding.rounded == two.rounding.rounded == 0
    a, b = read(one.output), read(two.output)
    assert a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.tensors)
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(a.tensor("blk.1.ffn_down.weight"), load_file(whole / "model.safetensors")[key].float())


def test_q8_0_is_within_half_a_step_and_says_what_it_could_not_quantize(tmp_path):
    folder = tiny("llama", tmp_path / "m", hidden_size=64, intermediate_size=56)
    report = write_model_gguf(folder, tmp_path / "m.gguf", dtype="q8_0")
    assert report.kept == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")
    held = read(report.output)
    assert {t.tensor_type.name for t in held.tensors.values()} == {"F32", "F16", "Q8_0"}
    assert 0.001 < report.rounding.worst < 0.01 and report.rounding.worst_name
    assert 0 < report.agreement.mean_logit_error < 0.05 * report.agreement.spread
    assert any("32 does not divide" in line for line in report.lines())
    values = {row["metric"]: row["value"] for row in report.to_dict()["results"]}
    assert values["rounding_max"] == report.rounding.worst and values["top1_agreement"] == report.agreement.top1


def test_a_quantized_tensor_that_is_off_by_two_steps_is_noticed(tmp_path, monkeypatch):
    folder = tiny("qwen2", tmp_path / "m", hidden_size=64, intermediate_size=64)

    def shifted(tensor, dtype, name):
        raw = encoded(tensor, dtype, name)
        if dtype == "q8_0":
            raw = raw.copy()
            raw[0, 5] = (int(raw[0, 5]) + 2) % 256  # one code of the first block, by two steps
        return raw

    monkeypatch.setattr("lofi.export.gguf_file.encoded", shifted)
    with pytest.raises(ProofError, match="q8_0"):
        write_model_gguf(folder, tmp_path / "m.gguf", dtype="q8_0")


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_bytes_of_each_dtype_mean_what_torch_says(dtype):
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [50.0]])
    got = decoded(encoded(values, dtype, "x"), dtype, (3, 64))
    if dtype == "q8_0":
        blocks = values.reshape(3, 2, 32)
        step = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        exact = (step * torch.round(blocks * 127 / blocks.abs().amax(-1, keepdim=True))).reshape(3, 64)
        torch.testing.assert_close(got, exact, atol=0, rtol=1e-6)
    else:
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert torch.equal(got, values.to(kind).float())


def test_metadata_states_the_numbers_tokens_and_special_ids(tmp_path):
    folder = tiny("llama-tied-biased", tmp_path / "m")
    report = write_model_gguf(folder, tmp_path / "m.gguf", name="a name")
    held = read(report.output)
    assert "output.weight" not in held.tensors and held.tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    wanted = {
        "general.architecture": "llama",
        "general.name": "a name",
        "general.file_type": 1,
        "llama.vocab_size": ROWS,
        "llama.context_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.feed_forward_length": 56,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: held.values[key] for key in wanted} == wanted
    assert held.values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens, types = held.values["tokenizer.ggml.tokens"], held.values["tokenizer.ggml.token_type"]
    assert len(tokens) == ROWS and tokens[300:302] == ["[PAD300]", "[PAD301]"] and types[:3] == [3, 3, 1]
    assert set(types[300:]) == {5}


def test_an_untied_head_is_written_and_a_tied_one_is_not(tmp_path):
    for name, there in (("llama", True), ("qwen2", False), ("gpt2-untied", True)):
        report = write_model_gguf(tiny(name, tmp_path / name), tmp_path / f"{name}.gguf")
        assert ("output.weight" in read(report.output).tensors) == there


def test_llama3_frequencies_are_divided_as_transformers_divides_them(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = tiny("llama", tmp_path / "m", head_dim=32, rope_parameters=rope)
    held = read(write_model_gguf(folder, tmp_path / "m.gguf", dtype="f32").output)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(held.tensor("rope_freqs.weight"), plain / theirs, atol=0, rtol=1e-5)
    assert llama3_divisors(rope, 32).unique().numel() > 3  # long, short, and in between


def test_the_context_ends_at_a_window_that_llama_cpp_does_not_have(tmp_path):
    report = write_model_gguf(tiny("mistral", tmp_path / "m"), tmp_path / "m.gguf")
    assert read(report.output).values["llama.context_length"] == 64 and "window 64" in report.notes[0]
    report = write_model_gguf(tiny("gemma2", tmp_path / "g"), tmp_path / "g.gguf")
    held = read(report.output).values
    assert (held["gemma2.context_length"], held["gemma2.attention.sliding_window"]) == (256, 8)


def test_yarn_states_only_what_differs_from_llama_cpps_own_factor(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    plain = read(write_model_gguf(tiny("llama", tmp_path / "a", rope_parameters=rope), tmp_path / "a.gguf").output)
    assert plain.values["llama.rope.scaling.type"] == "yarn" and "llama.rope.scaling.attn_factor" not in plain.values
    rope |= {"attention_factor": 1.3}
    own = read(write_model_gguf(tiny("llama", tmp_path / "b", rope_parameters=rope), tmp_path / "b.gguf").output)
    assert own.values["llama.rope.scaling.attn_factor"] == pytest.approx(1.3 / (0.1 * math.log(4) + 1))


def test_longrope_is_stated_up_to_where_the_short_factors_hold(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 128,
    }
    folder = tiny("phi3", tmp_path / "m", rope_parameters=rope, original_max_position_embeddings=128)
    report = write_model_gguf(folder, tmp_path / "m.gguf")
    held = read(report.output)
    assert held.values["phi3.context_length"] == 128 and "short rotary factors" in report.notes[0]
    assert held.tensor("rope_factors_long.weight").tolist() == rope["long_factor"]
    theirs = ROPE_INIT_FUNCTIONS["longrope"](AutoConfig.from_pretrained(folder), torch.device("cpu"))[1]
    assert held.values["phi3.rope.scaling.attn_factor"] == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mamba"}, "mamba model, and GGUF is written for llama, mistral, qwen2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "export a causal language model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized, and GGUF is written from dense"),
        ({"hidden_act": "relu"}, "its activation is relu, expected silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embedding by dynamic",
        ),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"intermediate_size": 57}, r"is \[56, 48\], the config says \[57, 48\]"),
    ],
)
def test_what_the_file_could_not_say_is_refused(values, said, tmp_path):
    folder = tiny("llama", tmp_path / "m")
    edit(folder, **values)
    with pytest.raises(ModelError, match=said):
        write_model_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("family", "values", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8, expected 16"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma2", {"attn_logit_softcapping": None}, "caps no logits"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("phi3", {"hidden_act": "gelu"}, "its activation is gelu"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, values, said, tmp_path):
    folder = tiny(family, tmp_path / "m")
    edit(folder, **values)
    with pytest.raises(ModelError, match=said):
        write_model_gguf(folder, tmp_path / "m.gguf")


def test_tensors_without_a_place_or_of_another_dtype_are_refused(tmp_path):
    folder = tiny("qwen3", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    extra = tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file(extra, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj\.bias, which llama.cpp's qwen3 has no place for"):
        write_model_gguf(folder, tmp_path / "m.gguf")
    save_file(tensors | {"model.norm.weight": torch.ones(48, dtype=torch.float64)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"norm\.weight is F64"):
        write_model_gguf(folder, tmp_path / "m.gguf")


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    folder = tiny("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"ffn_up\.weight does not fit into f16.*choose bf16 or f32"):
        write_model_gguf(folder, tmp_path / "m.gguf", dtype="f16")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".m*"))


def test_wrong_requests_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="dtype is 'q4', a GGUF file is written as f16, bf16, q8_0, f32"):
        write_model_gguf(tmp_path, tmp_path / "m.gguf", dtype="q4")
    folder = tiny("llama", tmp_path / "m")
    with pytest.raises(RequestError, match="is a folder, a GGUF export is one file"):
        write_model_gguf(folder, folder)
    shutil.rmtree(folder)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RequestError, match=r'pip install "lofi\[export\]"'):
        write_model_gguf(folder, tmp_path / "m.gguf")


def test_keys_of_the_bare_model_are_known_too(tmp_path):
    folder = tiny("gpt2", tmp_path / "m")
    whole = write_model_gguf(folder, tmp_path / "whole.gguf", dtype="f32", name="same")
    bare = {key.removeprefix("transformer."): t for key, t in load_file(folder / "model.safetensors").items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.ones(())}
    save_file(bare | buffers, folder / "model.safetensors", {"format": "pt"})
    report = write_model_gguf(folder, tmp_path / "bare.gguf", dtype="f32", name="same")
    one, other = read(whole.output), read(report.output)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.tensors)


def test_a_model_that_memory_does_not_hold_is_written_without_asking_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lofi.export.gguf_proof.fits", lambda parameters: False)
    report = write_model_gguf(tiny("llama", tmp_path / "m"), tmp_path / "m.gguf")
    assert report.agreement is None and any("no room in memory" in line for line in report.lines())
    assert "top1_agreement" not in {row["metric"] for row in report.to_dict()["results"]}


def test_the_shipped_model_is_written_with_its_template(lofi_tiny, tmp_path):
    report = write_model_gguf(lofi_tiny, tmp_path / "m.gguf", dtype="q8_0")
    held = read(report.output)
    assert held.values["tokenizer.ggml.pre"] == "smollm" and "<|im_start|>" in held.values["tokenizer.chat_template"]
    assert report.kept == () and report.agreement.top1 > 0.9
    assert any("<|im_end|>" in note for note in report.notes)
