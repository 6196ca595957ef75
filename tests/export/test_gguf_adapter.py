"""An adapter's GGUF adds to its base's GGUF what lofi's merge adds to the model, or is refused with the remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lofi
from lofi.errors import AdapterFileError, ProofError, RequestError
from lofi.export import gguf_adapter
from lofi.export.gguf_adapter import write_adapter_gguf
from lofi.export.gguf_file import read
from lofi.export.gguf_model import write_model_gguf
from lofi.merge.disk import merge_folder
from tiny_gguf import adapted, tiny

pytest.importorskip("gguf", reason='the gguf package is missing; pip install "lofi[export]"')
MIXED = {
    "r": 6,
    "lora_alpha": 9,
    "use_rslora": True,
    "rank_pattern": {r".*\.1\..*(q|c_attn|qkv).*": 3},
    "alpha_pattern": {r".*\.0\..*": 2.5},
}


def summed(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Every weight of the base's file plus what llama.cpp adds to it, from the two files alone."""
    held, extra = read(base), read(adapter)
    alpha = float(extra.values["adapter.lora.alpha"])
    total = {}
    for name in held.tensors:
        total[name] = held.tensor(name).double()
        if f"{name}.lora_a" in extra.tensors:
            a, b = (extra.tensor(f"{name}.lora_{which}").double() for which in "ab")
            rank = b.shape[1]
            product = a @ b.t() if name == "token_embd.weight" else b @ a  # rows looked up in A, or B (A x)
            total[name] += alpha / rank * product
    return total


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", r".*(q_proj|embed_tokens|lm_head)"),
        ("llama-tied-biased", ["q_proj", "k_proj", "v_proj", "down_proj"]),
        ("gemma2", "all-linear"),
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("phi3", "all-linear"),
    ],
)
def test_base_and_adapter_files_add_up_to_the_merged_models_file(family, targets, tmp_path):
    base = tiny(family, tmp_path / "base")
    adapted(base, tmp_path / "a", lofi.LoraConfig(**MIXED, target_modules=targets))
    merge_folder(base, tmp_path / "a", tmp_path / "merged")
    write_model_gguf(base, tmp_path / "base.gguf", dtype="f32")
    merged = read(write_model_gguf(tmp_path / "merged", tmp_path / "merged.gguf", dtype="f32").output)
    report = write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")
    total = summed(tmp_path / "base.gguf", tmp_path / "a.gguf")
    changed = 0
    for name, weight in total.items():
        torch.testing.assert_close(weight.float(), merged.tensor(name), atol=1e-6, rtol=1e-6)
        changed += not torch.equal(weight.float(), read(tmp_path / "base.gguf").tensor(name))
    assert changed == report.tensors // 2 > 1 and report.kind == "adapter"


def test_plain_lora_keeps_its_bits_and_says_so(tmp_path):
    base = tiny("qwen2", tmp_path / "base")
    adapted(base, tmp_path / "a", lofi.LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj"]))
    report = write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")
    held = read(report.output)
    assert held.values["adapter.lora.alpha"] == 6 and held.values["general.type"] == "adapter"
    assert held.values["general.architecture"] == "qwen2" and held.values["adapter.type"] == "lora"
    from lofi.files.layout import read_safetensors

    stored = read_safetensors(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    assert torch.equal(held.tensor("blk.1.attn_v.weight.lora_b"), stored[key.format("B")])
    assert torch.equal(held.tensor("blk.1.attn_v.weight.lora_a"), stored[key.format("A")])
    assert "bit for bit" in report.lines()[1]


@pytest.mark.parametrize(("dtype", "worst"), [("f16", 1e-3), ("bf16", 1e-2)])
def test_narrow_factors_are_within_their_rounding(dtype, worst, tmp_path):
    base = tiny("llama", tmp_path / "base")
    adapted(base, tmp_path / "a", lofi.LoraConfig(**MIXED, target_modules=["q_proj", "up_proj"]))
    report = write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf", dtype=dtype)
    assert 1e-5 < report.rounding.worst < worst and report.rounding.rounded == 4


def test_a_permutation_that_is_left_out_is_noticed(tmp_path, monkeypatch):
    base = tiny("llama", tmp_path / "base")
    adapted(base, tmp_path / "a", lofi.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    monkeypatch.setattr(gguf_adapter, "turned", lambda tensor, turn, heads: tensor)
    with pytest.raises(ProofError, match=r"layers\.0\.self_attn\.q_proj reads back"):
        write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_multiplier_that_is_not_folded_is_noticed(tmp_path, monkeypatch):
    base = tiny("qwen2", tmp_path / "base")
    adapted(base, tmp_path / "a", lofi.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["v_proj"]))
    pairs = gguf_adapter._pairs
    monkeypatch.setattr(gguf_adapter, "_pairs", lambda *given: [replace(pair, fold=1.0) for pair in pairs(*given)])
    with pytest.raises(ProofError, match="away from the adapter's"):
        write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lofi.LoraConfig(r=4, use_dora=True, target_modules=["v_proj"]), "DoRA rescales"),
        (lofi.LoraConfig(r=4, bias="lora_only", target_modules=["v_proj"]), "a trained bias"),
        (lofi.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["norm"]), "trained in full"),
        (lofi.LoraConfig(r=4, target_modules=["v_proj"], trainable_token_indices=[3, 5]), "token rows"),
        (lofi.LoraConfig(r=4, target_modules=["v_proj", "embed_tokens"]), "both embedding and head"),
    ],
)
def test_what_is_no_product_is_refused_with_the_remedy(config, said, tmp_path):
    base = tiny("qwen2", tmp_path / "base")
    adapted(base, tmp_path / "a", config)
    with pytest.raises(RequestError, match=f"{said}.*merge it into its base and export the merged model"):
        write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("config", [lofi.HoulsbyConfig(), lofi.PromptConfig()])
def test_other_methods_are_refused_by_name(config, tmp_path):
    base = tiny("llama", tmp_path / "base")
    adapted(base, tmp_path / "a", config)
    with pytest.raises(RequestError, match=f"is a {config.method} adapter.*LoRA alone; serve it with lofi"):
        write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")


def test_another_base_is_refused_and_one_that_cannot_be_told_is_noted(tmp_path):
    base = tiny("llama", tmp_path / "base")
    config = lofi.LoraConfig(r=4, target_modules=["o_proj"])
    adapted(base, tmp_path / "a", config)
    other = tiny("llama", tmp_path / "other", rms_norm_eps=1e-3)
    with pytest.raises(ProofError, match=r"another base.*rms_norm_eps"):
        write_adapter_gguf(tmp_path / "a", other, tmp_path / "a.gguf")
    small = tiny("llama", tmp_path / "small", hidden_size=32)
    with pytest.raises(AdapterFileError, match=r"is \[48, 48\], in .* it is \[32, 32\]"):
        write_adapter_gguf(tmp_path / "a", small, tmp_path / "a.gguf")
    with pytest.raises(AdapterFileError, match=r"updates model\.layers\.0\.self_attn\.o_proj, which"):
        write_adapter_gguf(tmp_path / "a", tiny("gpt2", tmp_path / "gpt2"), tmp_path / "a.gguf")
    (tmp_path / "a" / "lofi.json").unlink()
    assert "cannot be proved" in write_adapter_gguf(tmp_path / "a", other, tmp_path / "a.gguf").notes[0]


def test_an_adapter_of_zeros_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny("llama", tmp_path / "base")
    adapted(base, tmp_path / "a", lofi.LoraConfig(r=4, target_modules=["o_proj"]))
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v * 0 if "lora_B" in k else v for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ProofError, match="changes nothing"):
        write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")


def test_the_copy_of_an_embedding_that_peft_writes_is_no_obstacle_unless_it_differs(tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny("llama", tmp_path / "base")
    adapted(base, tmp_path / "a", lofi.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"]))
    file = tmp_path / "a" / "adapter_model.safetensors"
    copy = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(load_file(file) | {key: copy}, file, {"format": "pt"})
    assert write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf").tensors == 6
    save_file(load_file(file) | {key: copy + 1}, file, {"format": "pt"})
    with pytest.raises(RequestError, match="trained in full"):
        write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(RequestError, match="dtype is 'q8_0', a GGUF file is written as f32, f16, bf16"):
        write_adapter_gguf(tmp_path, tmp_path, tmp_path / "a.gguf", dtype="q8_0")
