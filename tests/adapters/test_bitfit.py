"""BitFit: every bias and nothing else, as copies beside the frozen ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lofi
from adapters.models import ids, stir, toy
from files import families
from files.families import V, family_model
from lofi.adapters.merge import merge_in_memory, merged_weights
from lofi.adapters.methods import BitFitConfig
from lofi.adapters.registry import adapter_of, adapter_tensors
from lofi.errors import TargetError
from quantized_models import quantized

BIASED = ["qwen2", "gpt2", "opt", "bloom", "phi", "bert_tags", "roberta", "deberta-v2"]


def biases(model) -> dict[str, torch.Tensor]:
    """Every bias of a plain model outside its task head."""
    return {
        name: p for name, p in model.named_parameters() if name.endswith("bias") and not name.startswith("classifier")
    }


def head_parameters(model) -> int:
    head = getattr(model, "classifier", None)
    return sum(p.numel() for p in head.parameters()) if head is not None else 0


@pytest.mark.parametrize("family", BIASED)
def test_as_many_parameters_train_as_the_biases_have_elements(family):
    model = family_model(family)
    expected = sum(p.numel() for p in biases(model).values()) + head_parameters(model)
    assert lofi.add_adapter(model, BitFitConfig()).trainable == expected > 0


def test_gpt2_medium_has_271_360_biases():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        report = lofi.add_adapter(GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)), BitFitConfig())
    assert report.trainable == 24 * 11 * 1024 + 1024 == 271_360  # norms 2, attention 3 + 1, MLP 4 + 1; the final norm


def test_the_formula_is_the_modules_own_with_the_trained_bias_in_place():
    model, x = toy(), torch.randn(4, 7)
    lofi.add_adapter(model, BitFitConfig())
    stir(model)
    t = adapter_tensors(model)
    y = F.linear(x, model.up.weight, t["up.bias"])
    assert torch.allclose(model.up(x), y, atol=1e-6)
    assert torch.allclose(model.norm(y), F.layer_norm(y, (13,), model.norm.weight, t["norm.bias"]), atol=1e-6)
    assert not torch.allclose(model.up(x), F.linear(x, model.up.weight, model.up.bias), atol=1e-2)


def test_gradients_are_those_of_thawed_biases():
    plain, model = toy(), toy()
    plain.requires_grad_(False)
    for parameter in biases(plain).values():
        parameter.requires_grad_(True)
    lofi.add_adapter(model, BitFitConfig())
    for one in (plain, model):
        one(ids()).pow(2).sum().backward()
    for name, tensor in adapter_tensors(model).items():
        assert torch.allclose(tensor.grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-6), name
        assert tensor.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [f for f in BIASED if f != "roberta"])
def test_a_fresh_adapter_is_the_base_bit_for_bit_and_a_merge_writes_the_trained_biases(family, dtype):
    model = family_model(family, dtype=dtype)
    base, frozen = families.logits(model), {name: p.clone() for name, p in biases(model).items()}
    lofi.add_adapter(model, BitFitConfig())
    assert torch.equal(families.logits(model), base)
    families.stir(model)
    changed = families.logits(model)
    assert (changed - base).abs().max() > 1e-2
    merged = merge_in_memory(model)
    values = biases(merged)
    assert all(torch.equal(values[name], t.to(dtype)) for name, t in adapter_tensors(model).items() if name in values)
    if dtype == torch.float32 or "classifier" not in model._modules:  # a head computes in float32, merged in bf16
        assert torch.equal(families.logits(merged), changed)
    lofi.unload(model)
    assert torch.equal(families.logits(model), base)
    assert all(torch.equal(model.get_parameter(name), t) for name, t in frozen.items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_biases_of_quantized_linears_train_and_merge_too(kind):
    model = quantized(family_model("qwen2"), kind)
    base = families.logits(model)
    report = lofi.add_adapter(model, BitFitConfig())
    assert len(report.matched) == 6 and torch.equal(families.logits(model), base)
    tokens = torch.randint(3, V, (2, 9))
    model(input_ids=tokens).logits.pow(2).mean().backward()
    assert all(t.grad is not None for t in adapter_tensors(model).values())
    families.stir(model)
    changed, codes = families.logits(model), model.model.layers[0].self_attn.q_proj.weight.clone()
    merged = merge_in_memory(model)
    assert (changed - base).abs().max() > 1e-2
    assert torch.equal(families.logits(merged), changed)
    assert [name.rsplit(".", 1)[1] for name, _ in merged_weights(model)] == ["bias"] * 6
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, codes)  # still quantized: only the bias moved


def test_two_adapters_add_their_shifts_and_lora_on_the_same_linear_counts_too():
    model, x = toy(), torch.randn(4, 7)
    base = model.up(x)
    for name, seed in (("a", 3), ("b", 4)):
        lofi.add_adapter(model, BitFitConfig(), name)
        stir(model, name, seed)
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up"]), "lora")
    stir(model, "lora", 5)
    shift = {name: adapter_tensors(model, name)["up.bias"] - model.up.bias for name in ("a", "b")}
    with lofi.using(model, "lora"):
        updated = model.up(x)
    for order in (["a", "b", "lora"], ["lora", "b", "a"]):
        with lofi.using(model, order):
            assert torch.allclose(model.up(x), updated + shift["a"] + shift["b"], atol=1e-5)
    assert not torch.allclose(updated, base, atol=1e-2)


def test_a_bias_that_has_not_moved_is_known_to_be_dead():
    model = toy()
    lofi.add_adapter(model, BitFitConfig())
    parts = adapter_of(model, "default").parts
    assert all(part.zero_delta() for part in parts.values())
    with torch.no_grad():
        parts["up"].bias[2] += 1e-3
    assert [path for path, part in parts.items() if not part.zero_delta()] == ["up"]


def test_modules_that_train_in_full_train_their_bias_there():
    model = toy()
    report = lofi.add_adapter(model, BitFitConfig(modules_to_save=["down"]))
    assert {m.path: m.kind for m in report.matched}["down"] == "copy"
    assert report.trainable == 13 + 13 + 3 + (13 * 5 + 5)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "t5"])
def test_a_model_without_biases_is_refused_with_the_reason(family):
    model = family_model(family)
    name = type(model).__name__
    with pytest.raises(TargetError, match=rf"BitFit trains biases, but this {name} has none .* use lora"):
        lofi.add_adapter(model, BitFitConfig())
    assert "lofi_registry" not in model.__dict__


def test_a_bias_that_is_added_in_another_way_is_reported():
    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_bias = torch.nn.Parameter(torch.zeros(3))

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), Gate())
    report = lofi.add_adapter(model, BitFitConfig())
    assert report.left_out == [("1.gate_bias", "a bias that a Gate adds in a way of its own")]
