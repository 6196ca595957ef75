"""The fused low-rank product against its plain composition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lofi.adapters.fused import CONV1D, LINEAR, draw_mask, low_rank_product, reference

SHAPES = [((2, 5), 7, 11, 3), ((1,), 1, 1, 1), ((3, 1, 4), 9, 2, 5)]


def make(lead, i, o, r, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = {"x": (*lead, i), "a": (r, i), "b": (o, r), "bias": (o,), "weight": (o, i)}
    return {k: torch.randn(s, dtype=dtype, requires_grad=k != "weight") for k, s in sizes.items()}


def fused(t, scale, product=LINEAR, weight=None):
    stored = t["weight"] if weight is None else weight
    return low_rank_product(t["x"], t["a"], t["b"], t["bias"], stored, product=product, scale=scale)


@pytest.mark.parametrize(("lead", "i", "o", "r"), SHAPES)
def test_gradcheck_passes_in_float64(lead, i, o, r):
    t = make(lead, i, o, r)

    def run(x, a, b, bias):
        return low_rank_product(x, a, b, bias, t["weight"], product=LINEAR, scale=0.7)

    assert torch.autograd.gradcheck(run, (t["x"], t["a"], t["b"], t["bias"]))


@pytest.mark.parametrize(("lead", "i", "o", "r"), SHAPES)
@pytest.mark.parametrize("product", [LINEAR, CONV1D], ids=["linear", "conv1d"])
def test_value_and_gradients_equal_the_plain_composition(lead, i, o, r, product):
    ours, plain = make(lead, i, o, r), make(lead, i, o, r)
    weight = ours["weight"].t().contiguous() if product.transposed else ours["weight"]
    y = fused(ours, 1.7, product, weight)
    z = reference(plain["x"], plain["a"], plain["b"], plain["bias"], plain["weight"], scale=1.7)
    assert torch.allclose(y, z, rtol=0, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    z.backward(g)
    for key in ("x", "a", "b", "bias"):
        assert torch.allclose(ours[key].grad, plain[key].grad, rtol=0, atol=1e-12), key


def test_the_tolerance_notices_a_scale_that_is_one_percent_off():
    t = make((2, 5), 7, 11, 3)
    z = reference(t["x"], t["a"], t["b"], t["bias"], t["weight"], scale=1.7)
    assert not torch.allclose(fused(t, 1.7 * 1.01), z, rtol=0, atol=1e-12)


def test_bf16_activations_with_float32_factors_stay_within_bf16_rounding_of_float64():
    t = make((64,), 96, 80, 8)
    exact = reference(t["x"], t["a"], t["b"], t["bias"], t["weight"], scale=0.5)
    low = {k: v.detach().to(torch.float32 if k in "ab" else torch.bfloat16) for k, v in t.items()}
    low["a"].requires_grad_()
    low["b"].requires_grad_()
    y = fused(low, 0.5)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).norm() / exact.norm()).item() < 2**-7
    y.sum().backward()
    assert low["a"].grad.dtype == torch.float32


def test_masked_gradients_equal_the_plain_composition_with_the_same_mask():
    ours, plain = make((4, 6), 9, 8, 3), make((4, 6), 9, 8, 3)
    torch.manual_seed(5)
    y = low_rank_product(
        ours["x"], ours["a"], ours["b"], ours["bias"], ours["weight"], product=LINEAR, scale=1.3, dropout=0.4
    )
    torch.manual_seed(5)
    mask, share = draw_mask(plain["x"], 0.4)
    z = reference(
        plain["x"], plain["a"], plain["b"], plain["bias"], plain["weight"], scale=1.3, keep=mask.double() / share
    )
    assert torch.allclose(y, z, atol=1e-12)
    y.square().sum().backward()
    z.square().sum().backward()
    for key in ("x", "a", "b", "bias"):
        assert torch.allclose(ours[key].grad, plain[key].grad, atol=1e-10), key


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_says_in_every_lane_of_a_draw(dropout):
    torch.manual_seed(0)
    mask, share = draw_mask(torch.empty(400_000), dropout)
    assert share == pytest.approx(1 - dropout, abs=1 / 65536)
    lanes = mask.view(-1, 4).float().mean(0)
    deviation = (dropout * (1 - dropout) / 100_000) ** 0.5
    assert (lanes - share).abs().max().item() < 5 * deviation


def test_neighbouring_lanes_of_the_mask_are_independent():
    torch.manual_seed(0)
    mask = draw_mask(torch.empty(400_000), 0.5)[0].view(-1, 4).float()
    correlation = torch.corrcoef(mask.t()) - torch.eye(4)
    assert correlation.abs().max().item() < 0.02


def test_autocast_computes_in_its_dtype_and_trains_float32_factors():
    t = {k: v.detach().float().requires_grad_(k in "ab") for k, v in make((6,), 9, 8, 3).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(t, 0.5)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert t["a"].grad.dtype == torch.float32
    assert t["b"].grad.abs().sum() > 0


def test_the_input_is_saved_once_and_no_full_size_temporary_survives_the_forward():
    t = make((32,), 64, 48, 2, torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(t, 0.5)
    full_size = [s for s in saved if s.numel() >= 32 * 48]
    assert {s.data_ptr() for s in full_size} <= {t["x"].data_ptr(), t["weight"].data_ptr()}
    assert len([s for s in saved if s.data_ptr() == t["x"].data_ptr()]) == 1


def test_a_trainable_base_weight_gets_its_gradient():
    import lofi

    model = nn.Sequential(nn.Linear(7, 5))
    lofi.add_adapter(model, lofi.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False))
    model[0].weight.requires_grad_()
    model(torch.randn(3, 7)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert model[0].adapters["default"].lora_B.grad.abs().sum() > 0
