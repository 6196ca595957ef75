"""The methods that every backend has."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lofi.quant.storage import EightBit, FourBit, RowCodes


class Kernels(Protocol):
    """Quantize, dequantize and multiply; all results equal the reference's, as each backend states."""

    name: str
    """What reports print, with the instruction set: "plain torch", "native avx512_bf16", "triton"."""

    def quantize_blockwise(self, weight: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """(codes uint8 (ceil(n / 2),), absmax float32 (blocks,)), bit-equal to nf4.quantize_blockwise."""
        ...

    def dequantize_blockwise(self, stored: FourBit, out: Tensor) -> Tensor:
        """Fill `out` (stored.shape, contiguous bf16, f16 or f32) with the weight, bit-equal to the reference."""
        ...

    def dequantize_rows(self, stored: FourBit, first: int, out: Tensor) -> Tensor:
        """Fill `out` (rows, I) with the rows from `first` on of the weight seen as a matrix (all but the last axis)."""
        ...

    def few_rows(self, x: Tensor, stored: FourBit) -> Tensor | None:
        """x (M, I) W^T -> (M, O) in x's dtype without forming W, float32 sums; None where that is not covered."""
        ...

    def quantize_weight_rows(self, weight: Tensor) -> EightBit:
        """Row-wise int8 codes of (O, I), bit-equal to int8.quantize_weight_rows."""
        ...

    def dequantize_int8(self, stored: EightBit, out: Tensor) -> Tensor:
        """Fill `out` (O, I) with the weight, bit-equal to the reference."""
        ...

    def quantize_rows(self, x: Tensor, threshold: float) -> RowCodes:
        """Activations (M, I) in row-wise codes, each row's outliers set apart."""
        ...

    def int8_product(self, rows: RowCodes, stored: EightBit, dtype: torch.dtype) -> Tensor:
        """x W^T (M, O) in `dtype` from codes and outliers; the integer part is exact."""
        ...
