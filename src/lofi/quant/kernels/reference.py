"""The backend in plain torch: what the others are measured against, and what runs where there is no other."""

from __future__ import annotations

import torch
from torch import Tensor

from lofi.quant import int8, nf4
from lofi.quant.storage import EightBit, FourBit, RowCodes

_PIECE = 1 << 22  # elements at once: the temporaries are ten and more times the piece


class Reference:
    """`interface.Kernels` in plain torch, on any device."""

    name = "plain torch"

    def quantize_blockwise(self, weight: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
        pieces = weight.reshape(-1).split(_PIECE // block // 2 * 2 * block or 2 * block)  # whole blocks, whole bytes
        done = [nf4.quantize_blockwise(piece, code, block) for piece in pieces]
        return torch.cat([codes for codes, _ in done]), torch.cat([absmax for _, absmax in done])

    def dequantize_blockwise(self, stored: FourBit, out: Tensor) -> Tensor:
        flat = out.view(-1)
        for first in range(0, len(flat), _PIECE):
            _fill(stored, first, flat[first : first + _PIECE])
        return out

    def dequantize_rows(self, stored: FourBit, first: int, out: Tensor) -> Tensor:
        _fill(stored, first * stored.shape[-1], out.view(-1))
        return out

    def few_rows(self, x: Tensor, stored: FourBit) -> Tensor | None:
        return None

    def quantize_weight_rows(self, weight: Tensor) -> EightBit:
        return int8.quantize_weight_rows(weight)

    def dequantize_int8(self, stored: EightBit, out: Tensor) -> Tensor:
        return out.copy_(int8.dequantize_int8(stored, out.dtype))

    def quantize_rows(self, x: Tensor, threshold: float) -> RowCodes:
        return int8.quantize_rows(x, threshold)

    def int8_product(self, rows: RowCodes, stored: EightBit, dtype: torch.dtype) -> Tensor:
        return int8.int8_product(rows, stored).to(dtype)


def _fill(stored: FourBit, first: int, out: Tensor) -> None:
    """Elements first .. first + len(out) of the flat weight."""
    places = torch.arange(first, first + len(out), device=out.device)
    pairs = stored.codes.view(-1)[places >> 1]
    codes = torch.where(places % 2 == 0, pairs >> 4, pairs & 15)
    out.copy_(stored.quant_map[codes.long()] * stored.scales()[places // stored.block])


REFERENCE = Reference()
