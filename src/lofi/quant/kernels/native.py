"""The backend in C++ for CPUs, called through ctypes.

Knows the functions of native/nf4*.cpp and what each argument is; the int8 half stands in native_int8.py, loading and the
choice of a path in library.py, what the numbers mean in quant/nf4.py. Knows not when to use it (dispatch.py).
"""

from __future__ import annotations

import os

from torch import Tensor

from lofi.quant.kernels.interface import Kernels
from lofi.quant.kernels.library import Library, NativeMissing
from lofi.quant.kernels.reference import REFERENCE, Reference
from lofi.quant.storage import FourBit


class NativeKernels(Reference):
    """`interface.Kernels` on CPU tensors by one path of the library."""

    def __init__(self, library: Library) -> None:
        self.name = f"native {library.name}"

    def quantize_blockwise(self, weight: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
        return REFERENCE.quantize_blockwise(weight, code, block)

    def dequantize_blockwise(self, stored: FourBit, out: Tensor) -> Tensor:
        return REFERENCE.dequantize_blockwise(stored, out)

    def few_rows(self, x: Tensor, stored: FourBit) -> Tensor | None:
        return None


def load_native() -> tuple[Kernels | None, str]:
    """The kernels, or None and why there are none; LOFI_ISA names the path, else the best that this CPU runs.

    Raises:
        RequestError: LOFI_ISA names no path, or one that this CPU does not run.
    """
    try:
        return NativeKernels(Library(isa=os.environ.get("LOFI_ISA") or None)), ""
    except NativeMissing as missing:
        return None, str(missing)
