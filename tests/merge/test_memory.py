"""Merging an open model: plain, equal, saved and reloaded, and the given model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lofi
from files.families import adapted, family_model, logits, stir
from lofi.adapters.registry import adapters_of, base_state
from lofi.adapters.switch import adapters_off
from lofi.errors import TargetError
from lofi.files.adapter_folder import save_adapter
from lofi.merge.memory import merge_and_unload


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "bert", "gemma3"])
def test_the_merged_model_is_plain_and_says_the_same(family):
    model = adapted(family)
    merged = merge_and_unload(model)
    assert type(merged) is type(family_model(family)) and adapters_of(merged) == {}
    assert not any(".adapters." in name for name, _ in merged.named_parameters())
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    report = merged.lofi_merge_report
    assert report.max_logit_error < 1e-5 and report.top1_agreement == 1.0 and report.adapter_effect > 0.01
    assert report.share_kept is None and report.kl < 1e-6


def test_the_given_model_stays_as_it_was_and_shares_what_did_not_change():
    model = adapted("llama", target_modules=["q_proj"])
    before = {k: v.clone() for k, v in base_state(model).items()}
    said = logits(model)
    merged = merge_and_unload(model)
    assert torch.equal(logits(model), said) and list(adapters_of(model)) == ["default"]
    assert all(torch.equal(before[k], v) for k, v in base_state(model).items())
    layer, twin = model.model.layers[0], merged.model.layers[0]
    assert twin.mlp.up_proj.weight is layer.mlp.up_proj.weight
    assert twin.self_attn.q_proj.weight is not layer.self_attn.q_proj.weight
    with adapters_off(model):
        assert torch.equal(logits(model), logits(family_model("llama")))


def test_in_place_consumes_the_model():
    model = adapted("llama")
    said = logits(model)
    merged = merge_and_unload(model, inplace=True)
    assert merged is model and adapters_of(model) == {}
    assert (logits(merged) - said).abs().max() < 1e-5


def test_one_of_two_adapters_is_merged_whichever_is_active():
    model = adapted("llama", "a", target_modules=["q_proj"])
    lofi.add_adapter(model, lofi.LoraConfig(r=2, target_modules=["up_proj"]), "b")
    stir(model, "b", seed=8)
    merged = merge_and_unload(model, "b")
    with lofi.using(model, "b"):
        assert (logits(merged) - logits(model)).abs().max() < 1e-5
    assert merged.lofi_merge_report.max_logit_error < 1e-5


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj"]])
@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
def test_a_tied_model_merged_saved_and_reloaded_says_the_same(family, targets, tmp_path):
    model = adapted(family, target_modules=targets)
    merged = merge_and_unload(model)
    merged.save_pretrained(tmp_path / "m")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert (logits(back) - logits(model)).abs().max() < 1e-5
    assert back.config.tie_word_embeddings == (targets == ["q_proj"])


def test_bfloat16_is_rounded_once_from_a_float32_sum():
    model = family_model("llama", dtype=torch.bfloat16)
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    stir(model)
    part = adapters_of(model)["default"].parts["model.layers.0.self_attn.q_proj"]
    base = model.model.layers[0].self_attn.q_proj.weight.float()
    exact = (base + 7 / 3 * (part.lora_B @ part.lora_A)).to(torch.bfloat16)
    merged = merge_and_unload(model).model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact)


def test_a_wrong_merge_shows_in_the_report():
    from lofi.merge.probes import random_probes
    from lofi.merge.verdict import compare_models

    model = adapted("llama")
    merged = merge_and_unload(model)
    with torch.no_grad():
        merged.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    verdict = compare_models(model, merged, random_probes(model))
    assert verdict.max_logit_error > 0.01 and verdict.kl > 1e-5


def test_any_module_can_be_merged_without_a_report(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(5, 7)

        def forward(self, x):
            return self.one(x)

    torch.manual_seed(0)
    model = Plain()
    lofi.add_adapter(model, lofi.LoraConfig(r=2, target_modules=["one"]))
    stir(model)
    merged, x = merge_and_unload(model), torch.randn(3, 5)
    assert merged.lofi_merge_report is None and torch.allclose(merged(x), model(x), atol=1e-6)
    assert save_adapter(model, tmp_path / "a").is_dir()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "c_attn"]])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantized_model_becomes_dense_where_it_was_adapted_and_can_be_saved(family, kind, targets, tmp_path):
    family_model(family).save_pretrained(tmp_path / "base")
    model = lofi.load_model(tmp_path / "base", quantization=kind, dtype="fp32")
    config = {"target_modules": targets if targets == "all-linear" else [targets[family == "gpt2"]]}
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7, **config))
    stir(model)
    said = logits(model)
    merged = merge_and_unload(model)
    assert torch.equal(logits(model), said) and model.lofi_quantization == kind
    packed = [path for path, m in merged.named_modules() if hasattr(m, "packed_shapes")]
    assert bool(packed) == (targets != "all-linear") and merged.lofi_quantization == (kind if packed else None)
    report = merged.lofi_merge_report
    limit = 1e-4 if kind == "nf4" else 0.05 * said.abs().max()  # int8 rounds the activations, too, of what it holds
    assert report.max_logit_error < limit and report.adapter_effect > 0.1
    merged.save_pretrained(tmp_path / "out")
    back = lofi.load_model(tmp_path / "out", dtype="fp32")
    assert (logits(back) - said).abs().max() < limit and back.lofi_quantization == merged.lofi_quantization


def test_an_unknown_name_is_refused():
    with pytest.raises(TargetError, match="no adapter 'b'"):
        merge_and_unload(adapted("llama"), "b")
