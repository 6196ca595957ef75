"""LLM.int8() in C++: binds the functions of native/int8*.cpp.

Knows what each argument is and which road a product takes; what the numbers mean stands in quant/int8.py, loading and
paths in library.py. With VNNI or AVX2 the library makes the whole product (with VNNI, oneDNN's is slower up to 256 rows
and a tenth faster at 1024: not worth a second road). For many rows with AMX, or with none of these, torch makes the
integer sums and the library finishes them in one pass instead of torch's five.
Types that the library does not know (float64) go to the reference.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lofi.errors import ModelError
from lofi.quant.int8 import integer_product
from lofi.quant.kernels.library import DONE, DTYPES, Address, Count, Int, Library
from lofi.quant.kernels.reference import REFERENCE
from lofi.quant.storage import EightBit, RowCodes

MANY = 32
"""Rows from which on packing the weight, which torch's product does at each call, costs less than it gains."""


class NativeInt8:
    """The int8 half of `interface.Kernels` on CPU tensors, by one path of the library; bit-equal on every path."""

    def __init__(self, library: Library) -> None:
        self._isa = library.isa
        own = library.name in ("avx512_bf16", "avx512", "avx2") and not (library.name == "avx512_bf16" and has_amx())
        self._sums_elsewhere = float("inf") if own else MANY
        self._rows = library.function(
            "lofi_int8_rows", Address, Int, *[Count] * 3, ctypes.c_float, *[Address] * 4, Int, Int
        )
        self._product = library.function("lofi_int8_product", *[Address] * 8, Int, *[Count] * 4, Int, Int)
        self._dense = library.function("lofi_int8_dense", *[Address] * 3, Int, Count, Count, Int, Int)

    def quantize_weight_rows(self, weight: Tensor) -> EightBit:
        """Row-wise codes of (O, I), bit-equal to int8.quantize_weight_rows."""
        if weight.dtype not in DTYPES:
            return REFERENCE.quantize_weight_rows(weight)
        codes, scale, _ = self._coded(weight, 0.0)
        return EightBit(codes, scale)

    def dequantize_int8(self, stored: EightBit, out: Tensor) -> Tensor:
        """Fill `out` (O, I) with the weight, bit-equal to int8.dequantize_int8."""
        if out.dtype not in DTYPES or not out.is_contiguous():
            return REFERENCE.dequantize_int8(stored, out)
        codes, scale = _checked(stored, *out.shape)
        there = (codes.data_ptr(), scale.data_ptr(), out.data_ptr(), DTYPES[out.dtype])
        self._run(self._dense, *there, *codes.shape)
        return out

    def quantize_rows(self, x: Tensor, threshold: float) -> RowCodes:
        """Activations (M, I) in row-wise codes, each row's outliers set apart; bit-equal to int8.quantize_rows."""
        if x.dtype not in DTYPES:
            return REFERENCE.quantize_rows(x, threshold)
        codes, scale, columns = self._coded(x, threshold)
        if not len(columns):
            return RowCodes(codes, scale, columns, x.new_empty(len(x), 0))
        picked = x[:, columns]  # (M, U)
        return RowCodes(codes, scale, columns, picked.masked_fill_(~(picked.abs() >= threshold), 0))

    def int8_product(self, rows: RowCodes, stored: EightBit, dtype: torch.dtype) -> Tensor:
        """x W^T (M, O) in `dtype`: integer sums exact, the rest in float32, rounded once.

        Exact   a row's result is the same bits whatever stands in the other rows
        """
        if dtype not in DTYPES:
            return REFERENCE.int8_product(rows, stored, dtype)
        w, w_scale = _checked(stored, len(stored.codes), rows.codes.shape[1])
        x, outliers = rows.codes.contiguous(), rows.outliers.float().contiguous()
        sums = integer_product(x, w) if len(x) >= self._sums_elsewhere else None
        y = torch.empty(len(x), len(w), dtype=dtype)
        given = (x, rows.scale, w, w_scale, rows.columns, outliers, sums, y)
        sizes = (len(x), *w.shape, len(rows.columns))
        self._run(self._product, *(None if t is None else t.data_ptr() for t in given), DTYPES[dtype], *sizes)
        return y

    def _coded(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (M, I), scales (M,), columns with outliers (U,): none under threshold 0."""
        x = x.detach() if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
        rows, width = x.shape
        codes, scale = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
        columns, found = torch.empty(width if threshold > 0 else 0, dtype=torch.int64), Count(0)
        limit = torch.tensor(threshold, dtype=x.dtype).item()  # as torch compares: rounded to the activations' dtype
        apart = (columns.data_ptr() if threshold > 0 else None, ctypes.addressof(found))
        into = (codes.data_ptr(), scale.data_ptr(), *apart)
        self._run(self._rows, x.data_ptr(), DTYPES[x.dtype], rows, width, x.stride(0), limit, *into)
        return codes, scale, columns[: found.value]

    def _run(self, function: Any, *arguments: Any) -> None:
        if function(*arguments, self._isa, torch.get_num_threads()) != DONE:
            raise MemoryError("no memory for an int8 product's scratch")


def _checked(stored: EightBit, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes (O, I) and scales (O,), contiguous: C trusts sizes and types, so they are looked at here."""
    codes, scale = stored.codes, stored.scale
    right = codes.shape == (rows, width) and codes.dtype == torch.int8 and codes.device.type == "cpu"
    if not right or scale.shape != (rows,) or scale.dtype != torch.float32:
        raise ModelError(
            f"an 8-bit weight has {codes.dtype} codes of shape {tuple(codes.shape)} on {codes.device}, {scale.dtype} "
            f"scales of shape {tuple(scale.shape)}, expected int8 ({rows}, {width}) and float32 ({rows},) on the CPU; "
            "quantize the model again"
        )
    return codes.contiguous(), scale.contiguous()


def has_amx() -> bool:
    """Whether this CPU multiplies int8 in tiles and torch uses them."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported())
