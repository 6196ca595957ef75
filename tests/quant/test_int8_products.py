"""int8 forward and input gradient as linears and adapters call them, on every backend that a CPU has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lofi.adapters.fused import low_rank_product
from lofi.quant import products
from lofi.quant.config import Int8Options
from lofi.quant.int8 import dequantize_int8, integer_product, product_in_pieces, quantize_weight_rows
from lofi.quant.kernels.native import load_native
from lofi.quant.kernels.reference import REFERENCE
from lofi.quant.linear import Int8Linear
from lofi.quant.products import input_gradient, int8_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["plain", "native"], autouse=True)
def kernels(request, monkeypatch):
    found, reason = (REFERENCE, "") if request.param == "plain" else load_native()
    if found is None:
        pytest.skip(reason)
    monkeypatch.setattr(products, "kernels_for", lambda device: found)
    return found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Seven columns at 60 times the others."""
    x = draw(rows, width, seed=seed)
    x[:, torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:7]] *= 60
    return x


STORED = quantize_weight_rows(draw(45, 131, seed=1))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_is_the_product_with_the_weight_within_half_a_code_of_each_activation(dtype, rows):
    x, bias = draw(rows, 131, seed=2).to(dtype), draw(45, seed=3).to(dtype)
    weight = dequantize_int8(STORED, torch.float32)
    y = int8_forward(x, bias, STORED, dtype, 6.0)
    exact = x.float() @ weight.t() + bias.float()
    half_code = x.float().abs().amax(1, keepdim=True) / 254
    bound = half_code * weight.abs().sum(1) * 1.001 + 3 * torch.finfo(dtype).eps * (exact.abs() + bias.float().abs())
    assert y.dtype == dtype and bool(((y.float() - exact).abs() <= bound).all())
    assert not torch.equal(y.float(), exact)


def test_planted_outliers_cost_a_fifteenth_of_what_they_cost_plain_int8():
    x = planted(64, 131, seed=4)
    exact = x @ dequantize_int8(STORED, torch.float32).t()
    apart, plain = (
        (int8_forward(x, None, STORED, torch.float32, threshold) - exact).abs().mean().item() for threshold in (6.0, 0)
    )
    assert 0 < apart <= plain / 15


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_input_gradient_is_the_product_with_the_dequantized_weight(dtype):
    g = draw(17, 45, seed=5).to(dtype)
    assert torch.equal(input_gradient(g, STORED, dtype), g @ dequantize_int8(STORED, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_in_a_batch_with_outliers_is_the_row_alone(dtype, kernels):
    x = planted(12, 131, seed=6).to(dtype)
    x[3] = draw(131, seed=7).clamp(-3, 3).to(dtype)  # one row without
    together = int8_forward(x, None, STORED, dtype, 6.0)
    alone = torch.cat([int8_forward(row[None], None, STORED, dtype, 6.0) for row in x])
    if kernels is REFERENCE:  # torch's sums take another order for another number of rows
        step = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        torch.testing.assert_close(together, alone, rtol=step, atol=1e-6 * together.abs().max().item())
    else:
        assert torch.equal(together, alone)


def test_strided_and_three_dimensional_inputs_are_rows_and_keep_their_dtype():
    x = planted(131, 6, seed=8).view(131, 3, 2).permute(2, 1, 0)  # (2, 3, 131), not contiguous
    y = int8_forward(x, None, STORED, torch.bfloat16, 6.0)
    flat = int8_forward(x.reshape(6, 131).contiguous(), None, STORED, torch.bfloat16, 6.0)
    assert y.shape == (2, 3, 45) and y.dtype == torch.float32 and torch.equal(y.view(6, 45), flat)
    assert int8_forward(x[:, :0], None, STORED, torch.float32, 6.0).shape == (2, 0, 45)


def test_a_linear_with_an_adapter_has_the_gradients_of_its_dequantized_weight():
    linear = torch.nn.Linear(131, 45)
    frozen = Int8Linear.from_dense(linear, Int8Options(compute_dtype="float32"))
    weight = frozen.dense_weight(torch.float32)
    a, b = draw(4, 131, seed=9).requires_grad_(), draw(45, 4, seed=10).requires_grad_()
    x = draw(5, 131, seed=11).requires_grad_()
    product = frozen.frozen_product()
    y = low_rank_product(x, a, b, frozen.bias, *product.stored(frozen), product=product, scale=0.5)
    g = draw(5, 45, seed=12)
    ours = torch.autograd.grad(y, (x, a, b), g)
    dense = F.linear(x, weight, frozen.bias) + 0.5 * F.linear(F.linear(x, a), b)
    for mine, exact in zip(ours, torch.autograd.grad(dense, (x, a, b), g), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)
    half_code = x.detach().abs().amax(1, keepdim=True) / 254
    assert bool(((y - dense).abs() <= half_code * weight.abs().sum(1) * 1.01).all())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (1, 5, 70), (7, 1, 70), (33, 20, 1025), (5, 4, 0)])
def test_integer_products_are_exact_at_every_size(shape):
    m, o, i = shape
    random = torch.Generator().manual_seed(13)
    a, b = (torch.randint(-127, 128, size, generator=random, dtype=torch.int8) for size in ((m, i), (o, i)))
    exact = (a.long() @ b.long().t()).int()
    for product in (integer_product, product_in_pieces):
        assert torch.equal(product(a, b), exact) and product(a, b).dtype == torch.int32
        assert torch.equal(product(a[:, ::2], b[:, ::2]), (a[:, ::2].long() @ b[:, ::2].long().t()).int())
        assert torch.equal(product(a[:1].expand(3, i), b), exact[:1].expand(3, o))
