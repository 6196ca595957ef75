"""Rounding for the layer's output: less error than nearest where inputs are correlated, the same where they are not."""

from __future__ import annotations

import pytest
import torch

from lofi.quant.grids import block_grid
from lofi.quant.int8 import dequantize_int8
from lofi.quant.linear import quantize_4bit
from lofi.quant.nf4 import dequantize_blockwise
from lofi.quant.requantize import Gram, output_error, requantize_4bit, requantize_int8
from lofi.quant.storage import EightBit, FourBit

SHAPES = [(37, 51), (24, 128), (5, 7), (1, 65), (130, 1), (16, 200)]  # 51, 7, 65, 1 and 200: blocks straddle rows


def weight_of(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(columns: int, *, rank: int = 8, rows: int = 600) -> torch.Tensor:
    """Inputs of which `rank` directions hold nearly everything, as those of a trained model do; (rows, columns)."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return few + 0.1 * torch.randn(rows, columns, generator=generator)


def gram_of(x: torch.Tensor) -> torch.Tensor:
    gram = Gram(x.shape[1])
    for piece in x.split(170):
        gram.add(piece.view(2, -1, x.shape[1]) if len(piece) % 2 == 0 else piece)
    return gram.matrix()


def dense(stored: FourBit | EightBit) -> torch.Tensor:
    if isinstance(stored, FourBit):
        return dequantize_blockwise(stored, torch.float32)
    return dequantize_int8(stored, torch.float32)


KINDS = [requantize_4bit, requantize_int8]


def test_the_gram_matrix_is_the_mean_of_outer_products_however_the_rows_come():
    x = correlated(9)
    assert torch.allclose(gram_of(x), x.t() @ x / 600, rtol=1e-5)
    assert not Gram(3).matrix().any()


@pytest.mark.parametrize("requantize", KINDS)
def test_the_output_error_is_that_of_the_layer_on_those_inputs(requantize):
    x, weight = correlated(51), weight_of(37, 51)
    stored = requantize(weight, rounding="nearest")
    measured = (x @ (weight - dense(stored)).t()).norm() / (x @ weight.t()).norm()
    assert output_error(weight, stored, gram_of(x)) == pytest.approx(float(measured), rel=1e-3)


@pytest.mark.parametrize("requantize", KINDS)
@pytest.mark.parametrize("columns", [51, 128, 200])
def test_with_correlated_inputs_compensation_leaves_less_than_half_the_error(requantize, columns):
    x, weight = correlated(columns), weight_of(37, columns)
    errors = {}
    for rounding in ("nearest", "compensated", "stochastic"):
        stored = requantize(weight, gram=gram_of(x), rounding=rounding)
        errors[rounding] = float((x @ (weight - dense(stored)).t()).norm())
    assert errors["compensated"] < 0.45 * errors["nearest"]
    assert errors["stochastic"] > errors["nearest"]


@pytest.mark.parametrize("requantize", KINDS)
def test_inputs_that_were_not_calibrated_on_gain_as_well(requantize):
    x, weight = correlated(96, rows=1200), weight_of(21, 96)
    gram = gram_of(x[:600])
    gaps = [
        (x[600:] @ (weight - dense(requantize(weight, gram=gram, rounding=rounding))).t()).norm()
        for rounding in ("compensated", "nearest")
    ]
    assert gaps[0] < 0.5 * gaps[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_with_uncorrelated_inputs_and_the_same_scales_it_is_nearest_to_the_bit(shape, monkeypatch):
    monkeypatch.setitem(block_grid.__kwdefaults__, "shrink", ())
    weight, eye = weight_of(*shape), torch.eye(shape[1])
    nearest = quantize_4bit(weight, double_quant=False)
    found = requantize_4bit(weight, gram=eye, double=False)
    assert torch.equal(found.codes, nearest.codes) and torch.equal(found.absmax, nearest.absmax)
    nearest8, found8 = requantize_int8(weight, rounding="nearest"), requantize_int8(weight, gram=eye)
    assert torch.equal(found8.codes, nearest8.codes) and torch.equal(found8.scale, nearest8.scale)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_stored_in_the_layout_of_a_quantizing_load(shape, double):
    weight, x = weight_of(*shape), correlated(shape[1])
    plain = quantize_4bit(weight, double_quant=double)
    for rounding in ("nearest", "compensated", "stochastic"):
        found = requantize_4bit(weight, gram=gram_of(x), rounding=rounding, double=double)
        assert (found.shape, found.block) == (plain.shape, plain.block)
        assert (found.codes.shape, found.codes.dtype) == (plain.codes.shape, torch.uint8)
        assert (found.absmax.shape, found.absmax.dtype) == (plain.absmax.shape, plain.absmax.dtype)
        assert (found.nested is None) == (not double)
        if found.nested is not None and plain.nested is not None:
            assert found.nested.absmax.shape == plain.nested.absmax.shape and found.nested.offset.shape == ()
        assert output_error(weight, found, None) < 0.5


@pytest.mark.parametrize("requantize", KINDS)
def test_nearest_is_what_a_quantizing_load_makes(requantize):
    weight = weight_of(37, 51)
    found = requantize(weight, rounding="nearest", gram=torch.eye(51) * 3)
    if isinstance(found, FourBit):
        assert torch.equal(found.codes, quantize_4bit(weight).codes)
    else:
        assert torch.equal(found.scale, weight.abs().amax(1))
        assert torch.equal(found.codes, (weight * (127 / found.scale)[:, None]).round().to(torch.int8))


@pytest.mark.parametrize("requantize", KINDS)
def test_compensated_is_never_worse_than_nearest(requantize):
    for seed in range(20):
        weight, x = weight_of(3, 11, seed=seed), correlated(11, rank=1 + seed % 7)
        gram = gram_of(x)
        errors = [
            output_error(weight, requantize(weight, gram=gram, rounding=r), gram) for r in ("compensated", "nearest")
        ]
        assert errors[0] <= errors[1]


def test_a_scale_below_the_largest_weight_is_taken_where_clipping_costs_less():
    weight = weight_of(8, 64)
    weight[:, 5] = 0.4  # far outside, and its input is always 0
    importance = torch.ones(64)
    importance[5] = 0
    found = requantize_4bit(weight, gram=torch.diag(importance), double=False)
    assert (found.absmax < 0.39).all()
    assert output_error(weight, found, torch.diag(importance)) < 0.9 * output_error(
        weight, quantize_4bit(weight, double_quant=False), torch.diag(importance)
    )


@pytest.mark.parametrize("double", [True, False])
def test_a_weight_that_is_already_on_the_grid_stays_to_the_bit_when_its_origin_is_given(double):
    like = requantize_4bit(weight_of(37, 51), gram=gram_of(correlated(51)), double=double)
    again = requantize_4bit(dense(like), gram=gram_of(correlated(51)), like=like, double=double)
    assert torch.equal(dense(again), dense(like))
    if double:  # whose scales are themselves rounded, so the largest of a block is not its scale
        assert not torch.equal(dense(requantize_4bit(dense(like), rounding="nearest")), dense(like))
    like8 = requantize_int8(weight_of(37, 51), gram=gram_of(correlated(51)))
    assert torch.equal(dense(requantize_int8(dense(like8), gram=gram_of(correlated(51)), like=like8)), dense(like8))


def test_a_small_update_of_a_quantized_weight_is_kept_in_part_where_nearest_loses_it():
    x = correlated(128)
    like = quantize_4bit(weight_of(64, 128))
    generator = torch.Generator().manual_seed(3)
    update = torch.randn(64, 3, generator=generator) @ torch.randn(3, 128, generator=generator) * 0.002
    wanted = dense(like) + update
    lost = (x @ update.t()).norm()
    kept = {
        rounding: 1
        - float(
            (x @ (wanted - dense(requantize_4bit(wanted, gram=gram_of(x), rounding=rounding, like=like))).t()).norm()
            / lost
        )
        for rounding in ("nearest", "compensated")
    }
    assert kept["nearest"] < 0.35 and kept["compensated"] > 0.6


@pytest.mark.parametrize("requantize", KINDS)
def test_stochastic_rounding_has_the_weight_as_its_mean_and_repeats_by_seed(requantize):
    weight = weight_of(6, 70)
    single = {} if requantize is requantize_int8 else {"double": False}  # so that no weight lies outside its grid
    drawn = torch.stack([dense(requantize(weight, rounding="stochastic", seed=seed, **single)) for seed in range(300)])
    step = drawn.amax(0) - drawn.amin(0)
    off = (drawn.mean(0) - weight).abs()
    assert (off <= 0.15 * step + 1e-3 * weight.abs().max()).all()
    assert off.mean() < 0.25 * (dense(requantize(weight, rounding="nearest", **single)) - weight).abs().mean()
    first, again = (requantize(weight, rounding="stochastic", seed=7) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, requantize(weight, rounding="stochastic", seed=8).codes)


@pytest.mark.parametrize("requantize", KINDS)
def test_dead_inputs_zero_rows_and_infinite_statistics_do_no_harm(requantize):
    weight, x = weight_of(12, 40), correlated(40)
    weight[3] = 0
    x[:, 7] = 0
    for gram in (gram_of(x), torch.zeros(40, 40), gram_of(x) * float("inf")):
        stored = requantize(weight, gram=gram)
        assert torch.isfinite(dense(stored)).all() and not dense(stored)[3].any()
        assert output_error(weight, stored, None) < 0.5
        assert (dense(stored)[:, 7] - weight[:, 7]).abs().max() < 0.05


@pytest.mark.parametrize("requantize", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_from_their_own_values(requantize, dtype):
    weight = weight_of(9, 33).to(dtype)
    gram = gram_of(correlated(33))
    assert torch.equal(requantize(weight, gram=gram).codes, requantize(weight.float(), gram=gram).codes)
