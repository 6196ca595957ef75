"""One dense buffer a thread, device and dtype, reused by every dequantization.

A fresh 32 MB tensor for each product costs more in page faults than the dequantization itself. What stands in the
buffer is valid until the next call on the same thread: a product reads it at once and nothing keeps it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_held = threading.local()


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor that the next call may overwrite."""
    buffers: dict[tuple[torch.dtype, torch.device], Tensor] = _held.__dict__.setdefault("buffers", {})
    wanted = math.prod(shape)
    flat = buffers.get((dtype, device))
    if flat is None or flat.numel() < wanted:
        flat = buffers[dtype, device] = torch.empty(wanted, dtype=dtype, device=device)
    return flat[:wanted].view(shape)


def release_workspace() -> None:
    """Give this thread's buffers back."""
    _held.__dict__.pop("buffers", None)
