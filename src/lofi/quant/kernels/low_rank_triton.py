"""The product of many adapters on GPUs: which kernels of triton_low_rank.py a call goes to, in which tiles.

Knows shapes, grids and launch options; what is computed stands in adapters/batched_product.py. Which slots a call has
is known on the device only, and is not asked for: few rows are taken for decoded tokens, one to a sequence, many for
prompts, and both ways are right for any slots. Slots are not checked either (that would wait for the device): a row of
a slot that there is not gets nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lofi.adapters.batched_product import PLAIN, Bound, LowRankProduct, check_call, check_stacks
from lofi.quant.kernels.triton import HALF, on_device, split_columns, why_no_triton

MANY = 128
"""Rows from which on they are multiplied in tiles: sequences that decode together are fewer, prompts are more."""
_TILE = 4096  # numbers of A or of B that a program without matrix units works on at once
_TOKENS = 16  # rows of a tile, the fewest that matrix units take


class TritonLowRank:
    """`LowRankProduct` on GPU tensors.

    Exact   as NativeLowRank, but that a row's bits depend on whether there are MANY rows
    """

    name = "triton"

    def __init__(self) -> None:
        self._kernels: Any = importlib.import_module("lofi.quant.kernels.triton_low_rank")

    def prepare(self, a: Tensor, b: Tensor, ranks: Tensor) -> Bound:
        """A call for these stacks: see LowRankProduct."""
        check_stacks(a, b, ranks)
        if a.dtype != torch.float32 and a.dtype not in HALF:
            return PLAIN.prepare(a, b, ranks)

        def call(x: Tensor, slots: Tensor, out: Tensor) -> None:
            check_call((a, b, ranks), x, slots, out)
            target = out.contiguous()
            if out.numel() and x.numel() and a.shape[1]:
                with on_device(x):
                    self._add(x.contiguous(), (a, b, ranks), slots.contiguous(), target)
            if target is not out:
                out.copy_(target)

        return call

    def _add(self, x: Tensor, stacks: tuple[Tensor, Tensor, Tensor], slots: Tensor, out: Tensor) -> None:
        a, b, ranks = stacks
        (count, most, inputs), outputs, rows = a.shape, b.shape[2], len(slots)
        tiles, sizes, tile_i, tile_o = _tiles(rows, most)
        pieces = -(-most // sizes["BLOCK_R"])
        splits, per_split = split_columns(tiles * pieces, inputs, tile_i, x.device)
        hidden = torch.empty((splits, rows, most), dtype=torch.float32, device=x.device)
        many = rows >= MANY
        shrink = self._kernels.shrink_tile_kernel if many else self._kernels.shrink_kernel
        expand = self._kernels.expand_tile_kernel if many else self._kernels.expand_kernel
        shape = (rows, inputs, count, most, per_split)
        shrink[(tiles, pieces, splits)](x, a, ranks, slots, hidden, shape, BLOCK_I=tile_i, **sizes)
        shape = (rows, outputs, count, most, splits)
        expand[(tiles, -(-outputs // tile_o))](hidden, b, ranks, slots, out, shape, BLOCK_O=tile_o, **sizes)


def _tiles(rows: int, most: int) -> tuple[int, dict[str, int], int, int]:
    """(programs over the rows, their BLOCK_M and BLOCK_R, BLOCK_I, BLOCK_O)."""
    if rows >= MANY:
        return -(-rows // _TOKENS), {"BLOCK_M": _TOKENS, "BLOCK_R": 16}, 128, 128
    ranks = min(16, 1 << (most - 1).bit_length())
    return rows, {"BLOCK_R": ranks}, min(1024, _TILE // ranks), min(512, _TILE // ranks)


def load_low_rank(device_type: str) -> tuple[LowRankProduct | None, str]:
    """The product for tensors on "cuda" (NVIDIA or AMD), or None and the reason why there is none."""
    reason = why_no_triton(device_type)
    return (None, reason) if reason else (TritonLowRank(), "")
