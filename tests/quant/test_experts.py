"""Stacked experts in codes: what they compute, their gradients, adapters on them, and the way back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lofi.adapters.attach import add_adapter
from lofi.adapters.config import LoraConfig
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.registry import trainable_counts
from lofi.adapters.switch import adapters_off
from lofi.quant.config import Int8Options, NF4Options
from lofi.quant.experts import FrozenExperts, freeze_experts

E, D, H = 3, 10, 14  # experts, width, inner width: no multiple of a block


class Gated(nn.Module):
    """Experts as transformers stacks them: gate and up in one parameter."""

    has_gate, has_bias, is_transposed, num_experts = True, False, False, E

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * H, D))
        self.down_proj = nn.Parameter(torch.randn(E, D, H))

    def _apply_gate(self, h):
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for token in range(len(x)):
            for e, w in zip(index[token], weights[token], strict=True):
                y[token] += w * F.linear(self._apply_gate(F.linear(x[token], self.gate_up_proj[e])), self.down_proj[e])
        return y


class Plain(nn.Module):
    """Experts stored (E, I, O), with biases and without a gate."""

    has_gate, has_bias, is_transposed, num_experts = False, True, True, E

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, D, H))
        self.up_proj_bias = nn.Parameter(torch.randn(E, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, D))
        self.down_proj_bias = nn.Parameter(torch.randn(E, D))
        self.act_fn = nn.GELU()

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for token in range(len(x)):
            for e, w in zip(index[token], weights[token], strict=True):
                h = self.act_fn(x[token] @ self.up_proj[e] + self.up_proj_bias[e])
                y[token] += w * (h @ self.down_proj[e] + self.down_proj_bias[e])
        return y


OPTIONS = {
    "nf4": NF4Options(compute_dtype="float32"),
    "nf4_single": NF4Options(compute_dtype="float32", double_quant=False, block=32),
    "int8": Int8Options(compute_dtype="float32"),
}


def frozen(cls, kind):
    """(packed experts, the same module with the packed weights dense)"""
    torch.manual_seed(5)
    module = cls()
    names = [name for name, p in module.named_parameters() if p.ndim == 3]
    weights = {name: getattr(module, name).detach() for name in names}
    freeze_experts(module, names, OPTIONS[kind], device="meta")
    for name, weight in weights.items():
        module.quantize_(name, weight)
    return module, module.to_dense()


def routed():
    torch.manual_seed(6)
    x = torch.randn(7, D, requires_grad=True)
    return x, torch.tensor([[0, 2]] * 4 + [[2, 0]] * 3), torch.rand(7, 2)  # no token goes to expert 1


@pytest.mark.parametrize("cls", [Gated, Plain])
@pytest.mark.parametrize("kind", OPTIONS)
def test_they_compute_and_pass_back_what_the_dequantized_weights_do(cls, kind):
    module, dense = frozen(cls, kind)
    assert type(dense) is cls and isinstance(module, cls) and isinstance(module, FrozenExperts)
    x, index, weights = routed()
    y = module(x, index, weights)
    expected = dense(x, index, weights)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    g = torch.randn_like(y)
    (mine,) = torch.autograd.grad(y, x, g)
    (theirs,) = torch.autograd.grad(expected, x, g)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_dense_parameters_are_near_what_they_were(kind):
    torch.manual_seed(5)
    before = Gated()
    module, _ = frozen(Gated, kind)
    for name, shape in module.packed_shapes.items():
        weight = module.dense_parameter(name)
        assert weight.shape == shape == getattr(before, name).shape
        error = (weight - getattr(before, name)).abs().mean()
        assert 0 < error < (0.02 if kind == "int8" else 0.12)
        assert module.dense_samples[name]
    assert module.quant_type == ("int8" if kind == "int8" else "nf4")


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_adapter_on_them_computes_trains_and_merges_as_on_dense_ones(kind):
    module, dense = frozen(Gated, kind)
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=[], target_parameters=["gate_up_proj"], init_lora_weights=False
    )
    outputs, gradients = [], []
    for experts in (module, dense):
        model = nn.ModuleDict({"experts": experts})
        torch.manual_seed(8)
        add_adapter(model, config)
        x, index, weights = routed()
        y = model["experts"](x, index, weights)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None] + [x.grad])
        if experts is module:
            packed = model
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) == 3
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-4)
    assert trainable_counts(packed) == (2 * E * (2 * H + D), E * 3 * H * D + 2 * E * (2 * H + D))
    merged = merge_in_memory(packed)["experts"]
    assert type(merged) is Gated
    x, index, weights = routed()
    torch.testing.assert_close(merged(x, index, weights), outputs[0], atol=1e-4, rtol=1e-5)
    with adapters_off(packed):
        assert not torch.allclose(packed["experts"](x, index, weights), outputs[0], atol=1e-2)


@pytest.mark.parametrize("kind", OPTIONS)
def test_casting_copying_and_pickling_leave_the_codes_alone(kind):
    module, _ = frozen(Plain, kind)
    before = {name: module.dense_parameter(name, torch.float32) for name in module.packed_shapes}
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to(torch.bfloat16)]
    for twin in twins:
        for name, weight in before.items():
            assert torch.equal(twin.dense_parameter(name, torch.float32), weight)
    assert module.up_proj_bias.dtype == torch.bfloat16


def test_codes_do_not_train_and_count_what_they_stand_for():
    module, _ = frozen(Gated, "nf4")
    assert not any(p.requires_grad for p in module.parameters())
    assert trainable_counts(module) == (0, E * 3 * H * D)
    held = sum(t.numel() * t.element_size() for n, t in module.named_buffers() if "quant_map" not in n)
    assert module.gate_up_proj.numel() + module.down_proj.numel() + held < 0.6 * E * 3 * H * D
