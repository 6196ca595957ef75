"""The grids that a weight may be rounded to: which values each element can take, once the scales stand.

A grid is chosen before anything is rounded and every scale on it is one the file can hold, so what is rounded to is
what is read back. Knows NF4's blocks (64 elements of the flat weight, across rows) and int8's rows, and of the inputs
only how much each column matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lofi.quant.storage import EightBit, FourBit, Nested

SHRINK = (0.975, 0.95, 0.92, 0.88, 0.84)
"""Scales tried below a block's largest magnitude: clipping a few elements may cost less than a coarser grid."""
_SMALLEST = 1e-38
_PIECE = 1 << 16  # blocks looked at together


class BlockGrid:
    """NF4's grid: element n of the flat weight takes one of the 16 values times the scale of block n // 64."""

    def __init__(self, stored: FourBit) -> None:
        self.stored = stored
        self.levels = stored.quant_map
        self.middles = (self.levels[:-1] + self.levels[1:]) / 2
        self._scales = stored.scales()
        rows, self._width = stored.shape
        self._first = torch.arange(rows, device=stored.absmax.device) * self._width  # (O,)

    def scales(self, columns: Tensor) -> Tensor:
        """Scales of whole columns (n,) -> (n, O)."""
        return self._scales[(self._first + columns[:, None]) // self.stored.block]

    def position(self, wanted: Tensor, scale: Tensor) -> Tensor:
        """`wanted` in units of its scale, inside the grid's ends."""
        return (wanted * (1.0 / scale.clamp(min=_SMALLEST))).clamp(-1, 1)

    def nearest(self, wanted: Tensor, scale: Tensor) -> Tensor:
        """Codes (uint8) of the grid's values next to `wanted`."""
        return torch.bucketize(self.position(wanted, scale), self.middles, out_int32=True).to(torch.uint8)

    def drawn(self, wanted: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Codes of one of the two values around `wanted`, drawn so that the mean is `wanted`."""
        x = self.position(wanted, scale)
        below = torch.bucketize(x, self.levels, right=True).sub_(1).clamp_(0, len(self.levels) - 2)
        share = (x - self.levels[below]) / (self.levels[below + 1] - self.levels[below])
        return (below + (_uniform(share, generator) < share)).to(torch.uint8)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What codes stand for, float32."""
        return self.levels[codes.long()] * scale

    def store(self, codes: Tensor) -> FourBit:
        """Codes (O, I) packed beside this grid's scales."""
        flat = codes.reshape(-1)
        if len(flat) % 2:
            flat = torch.cat([flat, torch.bucketize(flat.new_zeros(1).float(), self.middles).to(torch.uint8)])
        return replace(self.stored, codes=(flat[::2] << 4) | flat[1::2])


class RowGrid:
    """int8's grid: element (o, i) takes one of 255 even steps of row o's scale / 127."""

    def __init__(self, stored: EightBit) -> None:
        self.stored = stored

    def scales(self, columns: Tensor) -> Tensor:
        """Scales of whole columns (n,) -> (n, O)."""
        return self.stored.scale.expand(len(columns), -1)

    def position(self, wanted: Tensor, scale: Tensor) -> Tensor:
        """`wanted` in steps, inside the grid's ends."""
        return (wanted * torch.where(scale > 0, 127.0 / scale, 0.0)).clamp(-127, 127)

    def nearest(self, wanted: Tensor, scale: Tensor) -> Tensor:
        """Codes (int8) of the grid's values next to `wanted`."""
        return self.position(wanted, scale).round_().to(torch.int8)

    def drawn(self, wanted: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Codes of one of the two values around `wanted`, drawn so that the mean is `wanted`."""
        x = self.position(wanted, scale)
        return (x + _uniform(x, generator)).floor_().clamp_(-127, 127).to(torch.int8)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What codes stand for, float32."""
        return codes.float() * (scale * (1.0 / 127.0))

    def store(self, codes: Tensor) -> EightBit:
        """Codes (O, I) beside this grid's scales."""
        return replace(self.stored, codes=codes.contiguous())


Grid = BlockGrid | RowGrid


def block_grid(
    weight: Tensor, fresh: FourBit, like: FourBit | None, importance: Tensor | None, *, shrink: Sequence[float] = SHRINK
) -> BlockGrid:
    """The NF4 grid with the least weighted error under nearest rounding, block by block.

    Each block takes its fresh scale, one of `shrink` times it, or the scale it has in `like` (the quantized base: where
    the update is small its elements then stay exactly where they were). Weight and `importance`: (O, I), (I,).
    """
    largest = _largest(weight, fresh.block)
    like = like if like is not None and _comparable(like, fresh) else None
    frame = _frame(fresh, like, largest)
    options = [_represent(largest * share, frame) for share in (1.0, *shrink)]
    if like is not None:
        options.append(_represent(like.scales(), frame))
    stacked = torch.stack(options)  # (K, blocks)
    best = _least_error(weight, importance, [replace(frame, absmax=option) for option in options])
    return BlockGrid(replace(frame, absmax=stacked.gather(0, best[None])[0]))


def row_grid(weight: Tensor, fresh: EightBit, like: EightBit | None, importance: Tensor | None) -> RowGrid:
    """int8's grid: a row takes its largest magnitude as scale, or the scale it has in `like` where that errs less."""
    if like is None or like.shape != fresh.shape:
        return RowGrid(fresh)
    errors = []
    for scale in (fresh.scale, like.scale):
        grid = RowGrid(replace(fresh, scale=scale))
        steps = scale[:, None]
        gap = (weight - grid.values(grid.nearest(weight, steps), steps)).square_()
        errors.append((gap if importance is None else gap * importance).sum(1))
    return RowGrid(replace(fresh, scale=torch.where(errors[1] < errors[0], like.scale, fresh.scale)))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device="cpu").to(like.device)


def _comparable(like: FourBit, fresh: FourBit) -> bool:
    return like.shape == fresh.shape and like.block == fresh.block and (like.nested is None) == (fresh.nested is None)


def _largest(weight: Tensor, block: int) -> Tensor:
    return _in_blocks(weight.abs(), block).amax(1)


def _in_blocks(weight: Tensor, block: int) -> Tensor:
    flat = weight.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)


def _frame(fresh: FourBit, like: FourBit | None, largest: Tensor) -> FourBit:
    """The nested scales to code block scales in: those of `like`, widened where a group's scales outgrew them."""
    if like is None or like.nested is None:
        return fresh
    nested = like.nested
    gaps = torch.nn.functional.pad((largest - nested.offset).abs(), (0, -len(largest) % nested.block))
    needed = gaps.view(-1, nested.block).amax(1)
    return replace(fresh, nested=replace(nested, absmax=torch.maximum(nested.absmax, needed)))


def _represent(scales: Tensor, frame: FourBit) -> Tensor:
    """Scales as this file stores them: themselves, or the nearest of the 256 values of their group."""
    nested: Nested | None = frame.nested
    if nested is None:
        return scales
    spread = nested.absmax.repeat_interleave(nested.block)[: len(scales)].clamp(min=_SMALLEST)
    middles = (nested.quant_map[:-1] + nested.quant_map[1:]) / 2
    return torch.bucketize(((scales - nested.offset) / spread).clamp(-1, 1), middles).to(torch.uint8)


def _least_error(weight: Tensor, importance: Tensor | None, candidates: list[FourBit]) -> Tensor:
    """Index of the candidate with the least error in each block, int64 (blocks,)."""
    block, grid = candidates[0].block, BlockGrid(candidates[0])
    scales = torch.stack([candidate.scales() for candidate in candidates])  # (K, blocks)
    rows = _in_blocks(weight, block)  # (blocks, 64)
    weights = None if importance is None else _in_blocks(importance.expand(weight.shape), block)
    best = []
    for first in range(0, len(rows), _PIECE):
        part = slice(first, first + _PIECE)
        errors = []
        for scale in scales[:, part]:
            steps = scale[:, None]
            gap = (rows[part] - grid.values(grid.nearest(rows[part], steps), steps)).square_()
            errors.append((gap if weights is None else gap * weights[part]).sum(1))
        best.append(torch.stack(errors).argmin(0))
    return torch.cat(best)
