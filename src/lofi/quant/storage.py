"""What a quantized weight is in memory: its tensors, their shapes, what they cost. Computes block scales only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Nested:
    """Double quantization: the block scales of a weight, themselves 8-bit codes in blocks of 256."""

    absmax: Tensor  # (ceil(blocks / 256),) float32
    offset: Tensor  # () float32: the mean of the scales, taken off before coding
    quant_map: Tensor  # (256,) float32
    block: int = 256


@dataclass(frozen=True, eq=False)
class FourBit:
    """A weight in 4-bit codes: element = quant_map[code] * absmax of its block, blocks over the flat weight."""

    codes: Tensor  # (ceil(n / 2),) uint8, the first element of a pair in the high nibble
    absmax: Tensor  # (blocks,) float32; uint8 codes under double quantization
    quant_map: Tensor  # (16,) float32
    shape: tuple[int, ...]  # (O, I) or (E, O, I)
    block: int = 64
    nested: Nested | None = None

    @property
    def numel(self) -> int:
        """Elements of the weight that this stands for."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """How many block scales there are; the last block may be short."""
        return -(-self.numel // self.block)

    def scales(self) -> Tensor:
        """Block scales, float32 (blocks,): the map's value times the block's, plus the offset, each step rounded."""
        if self.nested is None:
            return self.absmax
        nested = self.nested
        coded = nested.quant_map[self.absmax.long()]  # (blocks,)
        spread = nested.absmax.repeat_interleave(nested.block)[: len(coded)]  # (blocks,)
        return coded * spread + nested.offset

    def bytes(self) -> int:
        """Bytes of codes and scales (the constant maps are 64 and 1024 more)."""
        nested = self.nested.absmax.numel() * 4 + 4 if self.nested else 0
        return self.codes.numel() + self.absmax.numel() * self.absmax.element_size() + nested


@dataclass(frozen=True, eq=False)
class EightBit:
    """A weight in row-wise 8-bit codes: element = codes * scale / 127 (computed as codes * (scale * (1 / 127)))."""

    codes: Tensor  # (O, I) int8
    scale: Tensor  # (O,) float32: the largest magnitude of the row, bitsandbytes' SCB

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        return tuple(self.codes.shape)


@dataclass(frozen=True, eq=False)
class RowCodes:
    """Activations in row-wise 8-bit codes, with each row's own outliers set apart."""

    codes: Tensor  # (M, I) int8, 0 where the entry is an outlier
    scale: Tensor  # (M,) float32: the largest magnitude of the row below the threshold
    columns: Tensor  # (U,) int64: columns in which any row has an outlier
    outliers: Tensor  # (M, U) in the activations' dtype: the outliers, 0 where that row's entry is none

    @property
    def rows(self) -> int:
        """M."""
        return int(self.codes.shape[0])
