"""Which kernels run on a device: the only place that chooses.

`LOFI_KERNELS` = plain, native or triton forces one, and it is an error if that one cannot run there; without it the
best that is there is taken, and `lofi doctor` says which and why.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from lofi.adapters.batched_product import PLAIN, LowRankProduct
from lofi.errors import RequestError
from lofi.quant.kernels.interface import Kernels
from lofi.quant.kernels.reference import REFERENCE

CHOICES = ("plain", "native", "triton")


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for tensors on `device`.  Raises  RequestError where LOFI_KERNELS asks for one that cannot run."""
    return _chosen(device.type, os.environ.get("LOFI_KERNELS", ""))


def low_rank_for(device: torch.device) -> LowRankProduct:
    """The product of many adapters for tensors on `device`, chosen as `kernels_for` chooses.

    What comes back has `.prepare(a, b, ranks)`, called once for a module's stacks, whose result is called with
    (x, slots, out) at each forward: see LowRankProduct.  Raises  RequestError as `kernels_for` does.
    """
    return PLAIN


@cache
def _chosen(device_type: str, asked: str) -> Kernels:
    if asked and asked not in CHOICES:
        raise RequestError(f"LOFI_KERNELS is '{asked}', expected one of {', '.join(CHOICES)}, or nothing")
    if asked == "plain":
        return REFERENCE
    if asked == "native" or (not asked and device_type == "cpu"):
        found, reason = _native() if device_type == "cpu" else (None, f"the tensors are on {device_type}")
    elif asked == "triton" or device_type == "cuda":
        found, reason = _triton(device_type)
    else:
        found, reason = None, ""
    if found is None and asked:
        raise RequestError(f"LOFI_KERNELS asks for {asked} kernels, but {reason}; unset it to use what there is")
    return found or REFERENCE


def _native() -> tuple[Kernels | None, str]:
    from lofi.quant.kernels.native import load_native

    return load_native()


def _triton(device_type: str) -> tuple[Kernels | None, str]:
    from lofi.quant.kernels.triton import load_triton

    return load_triton(device_type)
