"""8-bit kernels in Triton: row-wise codes of weights and activations, their product, dequantization.

Knows tiles and rounding; what the numbers mean stands in quant/int8.py. Codes are rounded half to even by adding and
taking 1.5 * 2^23 off, which leaves the integer in a float's low bits; exact as long as the product is rounded before
the sum, hence `enable_fp_fusion=False` at every launch.

Outliers are multiplied inside the product's epilogue by the weight's *codes*: 127 fits the 8 significant bits of
bfloat16, so the operands of that small product are exact and the weight's row scale multiplies both sums at the end.
Rejected: gathering and dequantizing the outliers' columns first (a copy of O x U and two more launches).
"""

from __future__ import annotations

import triton
import triton.language as tl

_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 of this size has no bits after the point
_STEP = tl.constexpr(1.0 / 127.0)
_GROUP = tl.constexpr(8)


@triton.jit
def row_codes_kernel(
    x,  # (M, I)
    codes,  # (M, I) int8
    scale,  # (M,) float32
    flags,  # (I,) int8: 1 where a row has an outlier in the column
    columns,  # I
    threshold,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row a program: scale = its largest magnitude (below the threshold), code = round(x * (127 / scale))."""
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    codes += row * columns
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32))
        if SPLIT:
            apart = size >= threshold
            tl.store(flags + at, apart.to(tl.int8), mask=apart & (at < columns))
            size = tl.where(apart, 0.0, size)
        largest = tl.maximum(largest, size)
    top = tl.max(largest, axis=0)
    tl.store(scale + row, top)
    divisor = tl.full([BLOCK], 0.0, tl.float32) + tl.where(top > 0, top, 1.0)  # a row of zeros has the codes 0
    factor = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), divisor) * 127.0  # (BLOCK,), what torch makes of 127 / scale
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        if SPLIT:
            value = tl.where(tl.abs(value) >= threshold, 0.0, value)
        whole = (value * factor + _HALF_EVEN) - _HALF_EVEN
        code = tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8)
        tl.store(codes + at, code, mask=at < columns)


@triton.jit
def dequantize_int8_kernel(codes, scale, out, columns, BLOCK: tl.constexpr):
    """out = codes * (scale * (1 / 127)), one rounding to out's dtype; a grid of (O, I / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + row * columns + at, mask=at < columns, other=0).to(tl.float32)
    value = code * (tl.load(scale + row) * _STEP)
    tl.store(out + row * columns + at, value.to(out.dtype.element_ty), mask=at < columns)


@triton.jit
def int8_product_kernel(
    activations,  # codes (M, I) int8, scale (M,), columns (U,) int64, outliers (M, U)
    weight,  # codes (O, I) int8, scale (O,)
    out,  # (M, O)
    shape,  # M, O, I, U
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out = (a b^T) (scale_a / 127) (scale_b / 127) + (outliers b[:, columns]^T) (scale_b / 127).

    Programs walk _GROUP tiles of M before the next tile of O, so that neighbours in time share what L2 holds.
    """
    a, scale_a, columns, outliers = activations
    b, scale_b = weight
    rows, rows_out, rows_in, apart = shape
    tiles_m, tiles_o = tl.cdiv(rows, BLOCK_M), tl.cdiv(rows_out, BLOCK_O)
    group = tl.program_id(0) // (_GROUP * tiles_o)
    height = tl.minimum(tiles_m - group * _GROUP, _GROUP)
    within = tl.program_id(0) % (_GROUP * tiles_o)
    m = ((group * _GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # (BLOCK_M,)
    o = ((within // height) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)  # (BLOCK_O,)
    i = tl.arange(0, BLOCK_I)
    rows_a, rows_b = a + m[:, None] * rows_in, b + o[None, :] * rows_in
    inside_m, inside_o = m < rows, o < rows_out
    sums = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.int32)
    for first in range(0, rows_in, BLOCK_I):
        at = first + i
        left = tl.load(rows_a + at[None, :], mask=inside_m[:, None] & (at < rows_in)[None, :], other=0)
        right = tl.load(rows_b + at[:, None], mask=inside_o[None, :] & (at < rows_in)[:, None], other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    step_a = tl.load(scale_a + m, mask=inside_m, other=0.0) * _STEP
    step_b = tl.load(scale_b + o, mask=inside_o, other=0.0) * _STEP
    y = sums.to(tl.float32) * step_a[:, None] * step_b[None, :]
    if APART:
        rest = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
        for first in range(0, apart, 16):
            u = first + tl.arange(0, 16)
            column = tl.load(columns + u, mask=u < apart, other=0)  # (16,)
            mask = inside_m[:, None] & (u < apart)[None, :]
            left = tl.load(outliers + m[:, None] * apart + u[None, :], mask=mask, other=0.0)  # (BLOCK_M, 16)
            mask = inside_o[None, :] & (u < apart)[:, None]
            right = tl.load(rows_b + column[:, None], mask=mask, other=0).to(left.dtype)  # (16, BLOCK_O)
            rest = tl.dot(left, right, rest, input_precision="ieee")
        y += rest * step_b[None, :]
    written = inside_m[:, None] & inside_o[None, :]
    tl.store(out + m[:, None] * rows_out + o[None, :], y.to(out.dtype.element_ty), mask=written)
