"""The product of many adapters in Triton: x through A into a scratch of float32, and that through B onto out.

Knows tiles, pointers and sums; what is computed stands in adapters/batched_product.py, which kernels a call goes to in
low_rank_triton.py. Two kernels and not one: every block of O needs all of x A^T, which would else be made anew in each.

Tokens by themselves (`shrink_kernel`, `expand_kernel`) have a program each, as in decoding, where neighbours have other
slots. Tiles of tokens (`shrink_tile_kernel`, `expand_tile_kernel`) use matrix units, once for each slot that occurs in
a tile: once, in a prompt. I is split where programs would be too few; the splits' sums are added in order, so a result
does not change from run to run. x A^T is not rounded, and it meets B in float32 (a small product beside the base's).

A slot that there is not, and ranks beyond an adapter's own, are never read: a row of such a slot gets nothing.
Rejected: sorting tokens by slot (a kernel more, and a wait or a worst-case grid, for segments that prompts have
anyway), atomics for the splits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _there(slots, at, mask, count):
    """Slots of the rows `at`, -1 for none, for rows past the end and for slots that there are not."""
    slot = tl.load(slots + at, mask=mask, other=-1)
    return tl.where(slot < count, slot, -1)


@triton.jit
def _hidden(hidden, m, r, mask, splits, rows, most):
    """x A^T of the rows m and the ranks r (broadcast together), its splits added in order."""
    at = m * most + r
    total = tl.load(hidden + at, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(hidden + split * rows * most + at, mask=mask, other=0.0)
    return total


@triton.jit
def shrink_kernel(
    x,  # (M, I)
    a,  # (S, R, I)
    ranks,  # (S,)
    slots,  # (M,)
    hidden,  # (splits, M, R) float32
    shape,  # M, I, S, R, columns to a split
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """hidden[split, m, r] = sum over the split's i of x[m, i] A[slot of m, r, i].

    A grid of (M, R / BLOCK_R, splits).
    """
    rows, rows_in, count, most, per_split = shape
    m = tl.program_id(0).to(tl.int64)
    slot = _there(slots, m, True, count).to(tl.int64)
    if slot >= 0:
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
        kept = r < tl.minimum(tl.load(ranks + slot), most)
        rows_a = a + (slot * most + r[:, None]) * rows_in
        begin = tl.program_id(2) * per_split
        total = tl.zeros([BLOCK_R, BLOCK_I], dtype=tl.float32)
        for i in range(begin, tl.minimum(begin + per_split, rows_in), BLOCK_I):
            at = i + tl.arange(0, BLOCK_I)  # (BLOCK_I,)
            left = tl.load(x + m * rows_in + at, mask=at < rows_in, other=0.0).to(tl.float32)
            right = tl.load(rows_a + at[None, :], mask=kept[:, None] & (at < rows_in)[None, :], other=0.0)
            total += left[None, :] * right.to(tl.float32)
        row = tl.program_id(2).to(tl.int64) * rows + m
        tl.store(hidden + row * most + r, tl.sum(total, axis=1), mask=kept)


@triton.jit
def expand_kernel(
    hidden,  # (splits, M, R) float32
    b,  # (S, R, O)
    ranks,  # (S,)
    slots,  # (M,)
    out,  # (M, O)
    shape,  # M, O, S, R, splits
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out[m] += sum over r of hidden[m, r] B[slot of m, r], rounded once; a grid of (M, O / BLOCK_O)."""
    rows, rows_out, count, most, splits = shape
    m = tl.program_id(0).to(tl.int64)
    slot = _there(slots, m, True, count).to(tl.int64)
    if slot >= 0:
        rank = tl.minimum(tl.load(ranks + slot), most)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)  # (BLOCK_O,)
        total = tl.zeros([BLOCK_O], dtype=tl.float32)
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
            left = _hidden(hidden, m, r, r < rank, splits, rows, most)
            at = (slot * most + r[:, None]) * rows_out + o[None, :]
            right = tl.load(b + at, mask=(r < rank)[:, None] & (o < rows_out)[None, :], other=0.0)
            total += tl.sum(left[:, None] * right.to(tl.float32), axis=0)
        place = out + m * rows_out + o
        result = tl.load(place, mask=o < rows_out, other=0.0).to(tl.float32) + total
        tl.store(place, result.to(out.dtype.element_ty), mask=o < rows_out)


@triton.jit
def shrink_tile_kernel(
    x,  # (M, I)
    a,  # (S, R, I)
    ranks,  # (S,)
    slots,  # (M,)
    hidden,  # (splits, M, R) float32
    shape,  # M, I, S, R, columns to a split
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """What shrink_kernel does for tiles of tokens; a grid of (M / BLOCK_M, R / BLOCK_R, splits)."""
    rows, rows_in, count, most, per_split = shape
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    begin = tl.program_id(2) * per_split
    end = tl.minimum(begin + per_split, rows_in)
    own = _there(slots, m, m < rows, count)
    waiting = own
    slot = tl.max(waiting, axis=0)
    while slot >= 0:
        kept = r < tl.minimum(tl.load(ranks + slot), most)
        mine = own == slot
        rows_a = a + (slot.to(tl.int64) * most + r[None, :]) * rows_in
        total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
        for i in range(begin, end, BLOCK_I):
            at = i + tl.arange(0, BLOCK_I)  # (BLOCK_I,)
            inside = at < rows_in
            left = tl.load(x + m[:, None] * rows_in + at[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
            right = tl.load(rows_a + at[:, None], mask=inside[:, None] & kept[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        place = hidden + (tl.program_id(2).to(tl.int64) * rows + m[:, None]) * most + r[None, :]
        tl.store(place, total, mask=mine[:, None] & kept[None, :])
        waiting = tl.where(mine, -1, waiting)
        slot = tl.max(waiting, axis=0)


@triton.jit
def expand_tile_kernel(
    hidden,  # (splits, M, R) float32
    b,  # (S, R, O)
    ranks,  # (S,)
    slots,  # (M,)
    out,  # (M, O)
    shape,  # M, O, S, R, splits
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """What expand_kernel does for tiles of tokens; a grid of (M / BLOCK_M, O / BLOCK_O)."""
    rows, rows_out, count, most, splits = shape
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)  # (BLOCK_O,)
    own = _there(slots, m, m < rows, count)
    waiting = own
    slot = tl.max(waiting, axis=0)
    while slot >= 0:
        rank = tl.minimum(tl.load(ranks + slot), most)
        mine = own == slot
        total = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
            mask = mine[:, None] & (r < rank)[None, :]
            left = _hidden(hidden, m[:, None], r[None, :], mask, splits, rows, most)
            at = (slot.to(tl.int64) * most + r[:, None]) * rows_out + o[None, :]
            right = tl.load(b + at, mask=(r < rank)[:, None] & (o < rows_out)[None, :], other=0.0)
            total = tl.dot(left, right.to(tl.float32), total, input_precision="ieee")
        place = out + m[:, None] * rows_out + o[None, :]
        written = mine[:, None] & (o < rows_out)[None, :]
        result = tl.load(place, mask=written, other=0.0).to(tl.float32) + total
        tl.store(place, result.to(out.dtype.element_ty), mask=written)
        waiting = tl.where(mine, -1, waiting)
        slot = tl.max(waiting, axis=0)
