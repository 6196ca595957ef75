"""LLM.int8() in plain torch: the executable spec of every int8 kernel.

LLM.int8() (arXiv 2208.07339): weights in 8-bit codes by row, activations in 8-bit codes by row, products of codes in
integers; activations of 6 and more stay in 16 bits. Where the paper takes out whole columns in which any row of the
batch has an outlier, here each row takes out its own entries, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lofi.quant.storage import EightBit, RowCodes

_EXACT = 1024  # products of two int8 codes summed this often stay below 2^24, where float32 counts exactly


def quantize_weight_rows(weight: Tensor) -> EightBit:
    """codes = round(w * (127 / scale)), half to even, scale = the row's largest magnitude; (O, I) -> EightBit."""
    codes, scale = _row_codes(weight.float())
    return EightBit(codes, scale)


def dequantize_int8(stored: EightBit, dtype: torch.dtype) -> Tensor:
    """codes * (scale * (1 / 127)) in float32, rounded once to `dtype`; (O, I)."""
    return (stored.codes.float() * stored.scale.mul(1.0 / 127.0)[:, None]).to(dtype)


def quantize_rows(x: Tensor, threshold: float) -> RowCodes:
    """Activations (M, I) in row-wise codes; entries of magnitude >= threshold are set apart (threshold 0: none is)."""
    if threshold <= 0:
        codes, scale = _row_codes(x.float())
        return RowCodes(codes, scale, x.new_empty(0, dtype=torch.int64), x.new_empty(len(x), 0))
    is_outlier = x.abs() >= threshold  # (M, I)
    columns = is_outlier.any(0).nonzero()[:, 0]  # (U,)
    outliers = torch.where(is_outlier, x, 0)[:, columns]  # (M, U)
    codes, scale = _row_codes(torch.where(is_outlier, 0, x).float())
    return RowCodes(codes, scale, columns, outliers)


def int8_product(rows: RowCodes, stored: EightBit) -> Tensor:
    """x W^T from codes: (codes codes^T) (scale_x / 127) (scale_w / 127) + outliers W[:, columns]^T, float32 (M, O).

    Exact   the integer part is exact; the result differs from x W^T by the rounding of x and nothing else
    """
    sums = integer_product(rows.codes, stored.codes).float()  # (M, O)
    y = sums * rows.scale.mul(1.0 / 127.0)[:, None] * stored.scale.mul(1.0 / 127.0)
    if len(rows.columns):
        apart = EightBit(stored.codes[:, rows.columns], stored.scale)
        y += rows.outliers.float() @ dequantize_int8(apart, torch.float32).t()
    return y


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 codes, exactly: int32 (M, O), by torch's integer product where that is a fast one and right.

    On CPUs without AVX-512 torch's is a loop over scalars, on GPUs it does not take every shape, and a size of 1 can
    leave its result unwritten (the stride of such an axis is passed on as it is: pytorch issue 195066).
    """
    fast = a.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if fast and min(*a.shape, *b.shape) > 1:
        return torch._int_mm(a.contiguous(), b.contiguous().t())
    return product_in_pieces(a, b)


def product_in_pieces(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 codes, exactly: int32 (M, O), summed in float32 pieces short enough to be exact."""
    pieces = zip(a.split(_EXACT, 1), b.split(_EXACT, 1), strict=True)
    sums = (((left.float() @ right.float().t()).to(torch.int32)) for left, right in pieces)
    return sum(sums, a.new_zeros(len(a), len(b), dtype=torch.int32))


def _row_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """127 / scale is 127 times the reciprocal (so torch divides a number by a tensor): two roundings, everywhere."""
    scale = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    factor = torch.where(scale > 0, 127.0 / scale, 0.0)  # a row of zeros has the codes 0, not 0 * inf
    return torch.round(x * factor[:, None]).clamp_(-127, 127).to(torch.int8), scale
