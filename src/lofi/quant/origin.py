"""A few values of a dense weight, kept when it is quantized, so that the base can still be recognised afterwards."""

from __future__ import annotations

import base64

import torch
from torch import Tensor

SAMPLES = 32
"""Values kept of each tensor (64 bytes in the record)."""
SMALLEST = 2.0**-14
"""Below this fp16 has no full precision: counted as zero on every side."""


def sample(tensor: Tensor) -> str:
    """Evenly spaced values of a tensor, as base64 of bfloat16 bits; empty for tensors without storage."""
    count = min(SAMPLES, tensor.numel())
    if count == 0 or tensor.device.type == "meta":
        return ""
    places = torch.arange(count, device=tensor.device) * tensor.numel() // count
    tensor = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    values = tensor[torch.unravel_index(places, tensor.shape)].to("cpu", torch.float32)
    canonical = torch.where(values.abs() < SMALLEST, 0.0, values).to(torch.bfloat16)
    return base64.b64encode(canonical.view(torch.int16).numpy().tobytes()).decode()
