"""Which kernels run on a device: the only place that chooses.

`LOFI_KERNELS` = plain, native or triton forces one, and it is an error if that one cannot run there; without it the
best that is there is taken, and `lofi doctor` says which and why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TypeAlias, TypeVar

import torch

from lofi.adapters.batched_product import PLAIN, LowRankProduct
from lofi.errors import RequestError
from lofi.quant.kernels.interface import Kernels
from lofi.quant.kernels.reference import REFERENCE

CHOICES = ("plain", "native", "triton")
T = TypeVar("T")
_Found: TypeAlias = tuple[T | None, str]  # what there is, or why there is nothing


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for tensors on `device`.  Raises  RequestError where LOFI_KERNELS asks for one that cannot run."""
    return _chosen(device.type, os.environ.get("LOFI_KERNELS", ""))


def low_rank_for(device: torch.device) -> LowRankProduct:
    """The product of many adapters for tensors on `device`, chosen as `kernels_for` chooses.

    What comes back has `.prepare(a, b, ranks)`, called once for a module's stacks, whose result is called with
    (x, slots, out) at each forward: see LowRankProduct.  Raises  RequestError as `kernels_for` does.
    """
    return _low_rank(device.type, os.environ.get("LOFI_KERNELS", ""))


@cache
def _chosen(device_type: str, asked: str) -> Kernels:
    return _best(device_type, asked, _native, _triton) or REFERENCE


@cache
def _low_rank(device_type: str, asked: str) -> LowRankProduct:
    return _best(device_type, asked, _native_low_rank, _triton_low_rank) or PLAIN


def _best(
    device_type: str, asked: str, native: Callable[[], _Found[T]], triton: Callable[[str], _Found[T]]
) -> T | None:
    """What native code or Triton offers there; None for plain torch."""
    if asked and asked not in CHOICES:
        raise RequestError(f"LOFI_KERNELS is '{asked}', expected one of {', '.join(CHOICES)}, or nothing")
    if asked == "plain":
        return None
    if asked == "native" or (not asked and device_type == "cpu"):
        found, reason = native() if device_type == "cpu" else (None, f"the tensors are on {device_type}")
    elif asked == "triton" or device_type == "cuda":
        found, reason = triton(device_type)
    else:
        found, reason = None, ""
    if found is None and asked:
        raise RequestError(f"LOFI_KERNELS asks for {asked} kernels, but {reason}; unset it to use what there is")
    return found


def _native() -> _Found[Kernels]:
    from lofi.quant.kernels.native import load_native

    return load_native()


def _native_low_rank() -> _Found[LowRankProduct]:
    from lofi.quant.kernels.low_rank_native import load_low_rank

    return load_low_rank()


def _triton(device_type: str) -> _Found[Kernels]:
    from lofi.quant.kernels.triton import load_triton

    return load_triton(device_type)


def _triton_low_rank(device_type: str) -> _Found[LowRankProduct]:
    from lofi.quant.kernels.low_rank_triton import load_low_rank

    return load_low_rank(device_type)
