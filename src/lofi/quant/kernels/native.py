"""The backend in C++ for CPUs, called through ctypes.

Knows the functions of native/nf4.cpp and what each argument is; the int8 half stands in native_int8.py, loading and the
choice of a path in library.py, what the numbers mean in quant/nf4.py. Knows not when to use it (dispatch.py).

A decoded token calls `few_rows` a hundred times and more, so a call must cost microseconds: functions are looked up
once and tensors go as addresses. C code trusts sizes, so they are checked here, each time. Types that the library does
not know (float64) go to the reference.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lofi.errors import ModelError
from lofi.quant.kernels.interface import Kernels
from lofi.quant.kernels.library import DTYPES, Address, Count, Int, Library, NativeMissing
from lofi.quant.kernels.native_int8 import NativeInt8
from lofi.quant.kernels.reference import REFERENCE
from lofi.quant.storage import FourBit

_WEIGHT = (Address, Address, Address, Address, Address, Address, Count, Count)  # struct FourBit of native/nf4.h


class NativeKernels(NativeInt8):
    """`interface.Kernels` on CPU tensors by one path of the library.

    Exact   codes, scales and weights are bit-equal to the reference's (but for which NaN); `few_rows` states its bound
    """

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.name = f"native {library.name}"
        self._isa = library.isa
        take = library.function
        self._dequantize = take("lofi_nf4_dequantize", *_WEIGHT, Count, Count, Address, Int, Int, Int)
        self._quantize = take("lofi_nf4_quantize", Address, Int, Count, Address, Count, Address, Address, Int, Int)
        self._few_rows = take("lofi_nf4_few_rows", *_WEIGHT, Address, Int, Count, Count, Address, Int, Int, Int)

    def quantize_blockwise(self, weight: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """(codes uint8 (ceil(n / 2),), absmax float32 (blocks,)), bit-equal to nf4.quantize_blockwise."""
        if weight.dtype not in DTYPES or block % 2:
            return REFERENCE.quantize_blockwise(weight, code, block)
        flat, count = weight.detach().contiguous(), weight.numel()
        codes = torch.empty((count + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty(-(-count // block), dtype=torch.float32)
        source = (flat.data_ptr(), DTYPES[weight.dtype], count, code.data_ptr(), block)
        self._quantize(*source, codes.data_ptr(), absmax.data_ptr(), self._isa, torch.get_num_threads())
        return codes, absmax

    def dequantize_blockwise(self, stored: FourBit, out: Tensor) -> Tensor:
        """Fill `out` (stored.shape) with the weight, bit-equal to the reference."""
        return self._fill(stored, 0, out) if _known(out) else REFERENCE.dequantize_blockwise(stored, out)

    def dequantize_rows(self, stored: FourBit, first: int, out: Tensor) -> Tensor:
        """Fill `out` (rows, I) with the weight's rows from `first` on, bit-equal to the reference."""
        if not _known(out):
            return REFERENCE.dequantize_rows(stored, first, out)
        return self._fill(stored, first * stored.shape[-1], out)

    def few_rows(self, x: Tensor, stored: FourBit) -> Tensor | None:
        """x (M <= 16, I) W^T -> (M, O), for I and block multiples of 64.

        The weight is what dequantizing to x's dtype gives; sums are float32. Each output is off by at most I * 2^-24 *
        sum |x w|, plus 2^-126 * sum (1 + |x| + |w|) where bf16 instructions take denormals for zero, plus its rounding.
        """
        rows, inputs = x.shape
        if len(stored.shape) != 2 or inputs != stored.shape[1] or not _known(x):
            return None
        y = x.new_empty(rows, stored.shape[0])
        done = self._few_rows(
            *_addresses(stored),
            *(x.data_ptr(), rows, inputs, stored.shape[0], y.data_ptr(), DTYPES[x.dtype]),
            *(self._isa, torch.get_num_threads()),
        )
        return None if done else y

    def _fill(self, stored: FourBit, first: int, out: Tensor) -> Tensor:
        count = out.numel()
        if not 0 <= first <= stored.numel - count:
            raise IndexError(f"elements {first} to {first + count} of a weight of {stored.numel}")
        where = (first, count, out.data_ptr(), DTYPES[out.dtype])
        self._dequantize(*_addresses(stored), *where, self._isa, torch.get_num_threads())
        return out


def _known(tensor: Tensor) -> bool:
    return tensor.dtype in DTYPES and _plain(tensor, tensor.dtype)


def _addresses(stored: FourBit) -> tuple[int | None, ...]:
    codes, absmax, code, nested, count = stored.codes, stored.absmax, stored.quant_map, stored.nested, stored.numel
    blocks = -(-count // stored.block)
    if codes.numel() != (count + 1) // 2 or not _plain(codes, torch.uint8) or code.numel() != 16:
        raise _broken(stored)
    scales = torch.float32 if nested is None else torch.uint8
    if absmax.numel() != blocks or not _plain(absmax, scales) or not _plain(code, torch.float32):
        raise _broken(stored)
    if nested is None:
        return codes.data_ptr(), absmax.data_ptr(), None, None, None, code.data_ptr(), stored.block, 0
    spread, outer = nested.absmax, nested.quant_map
    if spread.numel() != -(-blocks // nested.block) or outer.numel() != 256 or nested.offset.dtype != torch.float32:
        raise _broken(stored)
    if not _plain(spread, torch.float32) or not _plain(outer, torch.float32):
        raise _broken(stored)
    inner = (spread.data_ptr(), outer.data_ptr(), nested.offset.data_ptr())
    return codes.data_ptr(), absmax.data_ptr(), *inner, code.data_ptr(), stored.block, nested.block


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_contiguous() and tensor.is_cpu


def _broken(stored: FourBit) -> ModelError:
    return ModelError(
        f"a 4-bit weight of shape {tuple(stored.shape)} in blocks of {stored.block} has {stored.codes.numel()} bytes "
        f"of codes and {stored.absmax.numel()} {stored.absmax.dtype} scales on {stored.codes.device}, expected "
        f"{(stored.numel + 1) // 2} and {stored.blocks} on the CPU, with scales and code books in float32 (scales in "
        "uint8 under double quantization); quantize the model again"
    )


def load_native() -> tuple[Kernels | None, str]:
    """The kernels, or None and why there are none; LOFI_ISA names the path, else the best that this CPU runs.

    Raises:
        RequestError: LOFI_ISA names no path, or one that this CPU does not run.
    """
    try:
        return NativeKernels(Library(isa=os.environ.get("LOFI_ISA") or None)), ""
    except NativeMissing as missing:
        return None, str(missing)
