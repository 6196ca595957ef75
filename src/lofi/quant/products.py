"""Products with a quantized weight, as the low-rank product and the frozen linears run them.

Computed in the compute dtype: activations are cast to it, the weight is dequantized to it into the workspace (or never
formed, for a few rows), and the result is cast back. The weight has no gradient, so a linear needs two things: x W^T
and g W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lofi.quant.kernels.dispatch import kernels_for
from lofi.quant.kernels.workspace import workspace
from lofi.quant.storage import EightBit, FourBit

FEW = 16
"""Up to so many rows a 4-bit weight is read once and never written out."""


def dense(stored: FourBit | EightBit, dtype: torch.dtype) -> Tensor:
    """The weight in the workspace: to be read at once, and not kept."""
    out = workspace(stored.shape, dtype, stored.codes.device)
    return _fill(stored, out)


def dense_copy(stored: FourBit | EightBit, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor of its own."""
    return _fill(stored, torch.empty(stored.shape, dtype=dtype, device=stored.codes.device))


def _fill(stored: FourBit | EightBit, out: Tensor) -> Tensor:
    kernels = kernels_for(out.device)
    if isinstance(stored, FourBit):
        return kernels.dequantize_blockwise(stored, out)
    return kernels.dequantize_int8(stored, out)


def nf4_forward(x: Tensor, bias: Tensor | None, stored: FourBit, dtype: torch.dtype) -> Tensor:
    """x (..., I) W^T + bias -> (..., O) in x's dtype, computed in `dtype`."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (M, I)
    y = kernels_for(x.device).few_rows(rows, stored) if len(rows) <= FEW else None
    if y is None:
        y = F.linear(rows, dense(stored, dtype), None if bias is None else bias.to(dtype))
    elif bias is not None:
        y += bias
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def input_gradient(g: Tensor, stored: FourBit | EightBit, dtype: torch.dtype) -> Tensor:
    """g (M, O) W -> (M, I) in g's dtype, computed in `dtype`, through the dequantized weight."""
    return (g.to(dtype) @ dense(stored, dtype)).to(g.dtype)


def int8_forward(x: Tensor, bias: Tensor | None, stored: EightBit, dtype: torch.dtype, threshold: float) -> Tensor:
    """x (..., I) W^T + bias -> (..., O) in x's dtype by 8-bit codes of both, outliers in `dtype`."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (M, I)
    kernels = kernels_for(x.device)
    y = kernels.int8_product(kernels.quantize_rows(rows, threshold), stored, dtype)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)
