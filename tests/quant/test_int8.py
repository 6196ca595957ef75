"""The int8 reference: exact integers, rows that do not know their neighbours, outliers set apart."""

from __future__ import annotations

import pytest
import torch

from lofi.quant.int8 import dequantize_int8, int8_product, integer_product, quantize_rows, quantize_weight_rows


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weight_codes_and_scales_are_the_peers():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = draw(53, 77).half()  # the peer casts to half first
    codes, scale, _ = functional.int8_vectorwise_quant(weight)
    ours = quantize_weight_rows(weight)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.scale, scale.float())
    theirs = functional.int8_vectorwise_dequant(codes, scale)
    torch.testing.assert_close(dequantize_int8(ours, torch.float32), theirs.float(), rtol=3e-7, atol=0)


def test_a_code_is_half_a_step_from_its_weight_at_most():
    weight = draw(40, 33)
    stored = quantize_weight_rows(weight)
    error = (dequantize_int8(stored, torch.float32) - weight).abs()
    assert bool((error <= 0.5001 * stored.scale[:, None] / 127).all()) and error.max() > 0


def test_the_integer_product_is_exact_beyond_what_float32_counts():
    a = torch.full((2, 5000), 127, dtype=torch.int8)
    a[1, ::2] = -126
    b = torch.full((3, 5000), 127, dtype=torch.int8)
    expected = a.long() @ b.long().t()
    assert expected.max() > 2**24
    assert torch.equal(integer_product(a, b).long(), expected)


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_a_rows_result_does_not_depend_on_its_neighbours(threshold):
    stored = quantize_weight_rows(draw(29, 96, seed=1))
    x = draw(13, 96, seed=2)
    x[3, 7], x[5, 11], x[5, 12] = 40.0, -60.0, 6.0
    together = int8_product(quantize_rows(x, threshold), stored)
    alone = torch.cat([int8_product(quantize_rows(row[None], threshold), stored) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6 * together.abs().max().item())


def test_taking_whole_columns_out_would_make_rows_depend_on_each_other():
    """The peer's way: the guard above must be able to fail."""
    x = draw(4, 96, seed=2)
    x[0, 7] = 40.0
    mine = quantize_rows(x, 6.0)
    assert mine.codes[1, 7] != 0 and mine.codes[0, 7] == 0
    assert mine.columns.tolist() == [7] and mine.outliers[1, 0] == 0


def test_planted_outliers_cost_a_fifteenth_of_what_they_cost_plain_int8():
    stored = quantize_weight_rows(draw(128, 256, seed=3))
    x = draw(64, 256, seed=4)
    x[:, torch.randperm(256, generator=torch.Generator().manual_seed(5))[:7]] *= 60
    exact = x @ dequantize_int8(stored, torch.float32).t()
    errors = [(int8_product(quantize_rows(x, t), stored) - exact).abs().mean().item() for t in (6.0, 0.0)]
    assert errors[0] <= errors[1] / 15


def test_rows_of_zeros_and_rows_of_outliers_alone_are_right():
    stored = quantize_weight_rows(draw(9, 10, seed=6))
    x = torch.zeros(3, 10)
    x[1] = 50.0
    y = int8_product(quantize_rows(x, 6.0), stored)
    assert not y[0].any() and not y[2].any()
    torch.testing.assert_close(y[1], x[1] @ dequantize_int8(stored, torch.float32).t())


def test_a_zero_row_of_weights_stays_zero():
    weight = draw(3, 8)
    weight[1] = 0
    assert not dequantize_int8(quantize_weight_rows(weight), torch.float32)[1].any()
