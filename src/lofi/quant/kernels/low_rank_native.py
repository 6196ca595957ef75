"""The product of many adapters in C++: binds the function of native/low_rank.cpp.

Knows what each argument is and how to call it at little cost; what is computed stands in adapters/batched_product.py,
loading and paths in library.py. A decoded token makes one call a linear, so what does not change from call to call is
settled in `prepare`, and a call looks at no more than C must be able to trust: sizes, types, layouts (1 us; another
with ctypes). Slots and ranks, which are data, are looked at in C. Types that the library does not know (float64), more
than 8192 ranks, and tensors that want a gradient go to the reference.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from lofi.adapters.batched_product import PLAIN, Bound, LowRankProduct, check_call, check_slots, check_stacks, reference
from lofi.quant.kernels.library import DTYPES, OUT_OF_RANGE, Address, Count, Int, Library, NativeMissing

LONGEST = 8192
"""Ranks that the library holds at once (kHeld of native/low_rank.h)."""
_INDEX = torch.int32


class _Stacks(ctypes.Structure):
    """struct LowRankStacks of native/low_rank.h."""

    _fields_ = (
        *((name, Address) for name in ("a", "b", "ranks")),
        *((name, Count) for name in ("slots", "rank", "inputs", "outputs", "dtype")),
    )


class NativeLowRank:
    """`LowRankProduct` on CPU tensors by one path of the library.

    Exact   sums in float32, x A^T not rounded, out rounded once: off from exact arithmetic by at most (I + R + 8) *
            2^-24 of |out| + sum |x a b|, plus out's rounding; avx512_bf16 takes bf16 denormals of x and A for zero.
            A row has the same bits whatever stands in the other rows, and with any number of threads.
    """

    def __init__(self, library: Library) -> None:
        self.name = f"native {library.name}"
        self._isa = library.isa
        self._add = library.function(
            "lofi_low_rank", *(Address, Address, Count, Address, Address, Count, Count), Int, Int
        )

    def prepare(self, a: Tensor, b: Tensor, ranks: Tensor) -> Bound:
        """A call for these stacks, whose memory must stay where it is: see LowRankProduct."""
        check_stacks(a, b, ranks)
        if a.dtype not in DTYPES or not a.is_cpu or a.shape[1] > LONGEST:
            return PLAIN.prepare(a, b, ranks)
        return _Call(self._add, self._isa, (a, b, ranks))


class _Call:
    """The product with one module's stacks."""

    __slots__ = ("add", "dtype", "inputs", "isa", "outputs", "stacks", "tensors", "there")

    def __init__(self, add: Any, isa: int, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        a, b, ranks = self.tensors = tensors  # kept alive: C has their addresses
        self.add, self.isa, self.dtype, self.inputs, self.outputs = add, isa, a.dtype, a.shape[2], b.shape[2]
        addresses = (a.data_ptr(), b.data_ptr(), ranks.data_ptr())
        self.stacks = _Stacks(*addresses, *a.shape, self.outputs, DTYPES[a.dtype])
        self.there = ctypes.addressof(self.stacks)

    def __call__(self, x: Tensor, slots: Tensor, out: Tensor) -> None:
        """Add each row's product to out; rows that lie apart, and tensors that want a gradient, take the longer way."""
        dtype, inputs, outputs, rows = self.dtype, self.inputs, self.outputs, slots.numel()
        if (
            (x.dtype is dtype and x.is_contiguous() and x.numel() == rows * inputs and x.shape[-1] == inputs)
            and (out.dtype is dtype and out.is_contiguous() and out.numel() == rows * outputs)
            and (out.shape[-1] == outputs and slots.dtype is _INDEX and slots.is_contiguous())
            and (x.is_cpu and slots.is_cpu and out.is_cpu and not (x.requires_grad or out.requires_grad))
        ):
            self._run(x.data_ptr(), inputs, slots, out.data_ptr(), outputs)
        else:
            self._with_care(x, slots, out)

    def _run(self, x: int, x_stride: int, slots: Tensor, out: int, out_stride: int) -> None:
        at = (x, x_stride, slots.data_ptr(), out, out_stride, slots.numel())
        if self.add(self.there, *at, self.isa, torch.get_num_threads()) == OUT_OF_RANGE:
            check_slots(slots, self.tensors[2], self.stacks.rank)

    def _with_care(self, x: Tensor, slots: Tensor, out: Tensor) -> None:
        check_call(self.tensors, x, slots, out)
        if x.requires_grad or out.requires_grad:
            return reference(x, *self.tensors, slots, out)
        rows = x.reshape(-1, self.inputs)  # (M, I)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        result = _as_rows(out)
        target = out.contiguous() if result is None else result
        stride = self.outputs if result is None else result.stride(0)
        self._run(rows.data_ptr(), rows.stride(0), slots.contiguous(), target.data_ptr(), stride)
        if result is None:
            out.copy_(target)
        return None


def _as_rows(out: Tensor) -> Tensor | None:
    """`out` as (M, O) in its own memory, or None where its rows are not evenly apart or not in one piece each."""
    try:
        rows = out.view(-1, out.shape[-1])
    except RuntimeError:
        return None
    return rows if rows.stride(1) == 1 else None


def load_low_rank() -> tuple[LowRankProduct | None, str]:
    """The product, or None and why there is none; LOFI_ISA as in native.load_native."""
    try:
        return NativeLowRank(Library(isa=os.environ.get("LOFI_ISA") or None)), ""
    except NativeMissing as missing:
        return None, str(missing)
