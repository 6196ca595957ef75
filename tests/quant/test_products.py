"""Products through the workspace: nothing that is returned lives in it, and dtypes come out as they went in."""

from __future__ import annotations

import pytest
import torch

from lofi.quant.kernels.workspace import release_workspace, workspace
from lofi.quant.linear import quantize_4bit
from lofi.quant.nf4 import dequantize_blockwise
from lofi.quant.products import FEW, dense, dense_copy, input_gradient, nf4_forward

CPU = torch.device("cpu")


def weights(outputs=24, inputs=192):
    return quantize_4bit(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("inputs", [192, 77])
@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_few_rows_and_many_give_the_product_with_the_weight_in_that_dtype(rows, dtype, inputs):
    stored = weights(inputs=inputs)
    x = torch.randn(rows, inputs).to(dtype)
    bias = torch.randn(24).to(dtype)
    exact = x.double() @ dequantize_blockwise(stored, dtype).double().t() + bias.double()
    y = nf4_forward(x, bias, stored, dtype)
    assert y.dtype == dtype and y.shape == (rows, 24)
    bound = 4 * torch.finfo(dtype).eps * (exact.abs().max().item() + inputs**0.5)
    assert (y.double() - exact).abs().max().item() <= bound


def test_a_wider_input_keeps_its_dtype_around_a_narrow_product():
    x = torch.randn(20, 192)
    y = nf4_forward(x, None, weights(), torch.bfloat16)
    assert y.dtype == torch.float32 and torch.equal(y, y.bfloat16().float())
    g = input_gradient(torch.randn(20, 24), weights(), torch.bfloat16)
    assert g.dtype == torch.float32 and torch.equal(g, g.bfloat16().float())


def test_what_a_product_returns_survives_the_next_one():
    first, other = weights(), weights(48, 192)
    x = torch.randn(20, 192)
    y = nf4_forward(x, None, first, torch.float32)
    kept = y.clone()
    nf4_forward(x, None, other, torch.float32), input_gradient(torch.randn(20, 48), other, torch.float32)
    assert torch.equal(y, kept)


def test_the_dense_weight_is_a_tensor_of_its_own_only_when_copied():
    stored, other = weights(), quantize_4bit(torch.ones(24, 192))
    copied, shared = dense_copy(stored, torch.float32), dense(stored, torch.float32)
    assert torch.equal(copied, shared)
    dense(other, torch.float32)
    assert torch.equal(copied, dequantize_blockwise(stored, torch.float32)) and bool((shared == 1).all())


def test_the_workspace_grows_to_the_largest_weight_and_is_given_back():
    release_workspace()
    small = workspace((3, 5), torch.float32, CPU)
    large = workspace((30, 50), torch.float32, CPU)
    again = workspace((2, 2), torch.float32, CPU)
    assert small.data_ptr() != large.data_ptr() and again.data_ptr() == large.data_ptr()
    assert workspace((2, 2), torch.bfloat16, CPU).dtype == torch.bfloat16
    release_workspace()
    assert workspace((2, 2), torch.float32, CPU).untyped_storage().nbytes() == 16


def test_three_dimensional_inputs_and_strided_ones_are_rows():
    stored = weights()
    x = torch.randn(192, 3, 2).permute(2, 1, 0)  # (2, 3, 192), not contiguous
    y = nf4_forward(x, None, stored, torch.float32)
    torch.testing.assert_close(y, x @ dequantize_blockwise(stored, torch.float32).t(), rtol=1e-5, atol=1e-4)
