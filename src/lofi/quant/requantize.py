"""Rounding a weight to NF4 or int8 so that what the layer says changes least, not what the weight is.

Nearest rounding minimises each element's error and forgets an update that is smaller than the grid: merged into a
quantized base it mostly rounds back to the base. Compensated rounding minimises ||X (W - Q)^T||_F over the layer's
inputs X: it goes through the columns one by one and lets every later column make up for the errors of the earlier ones.
  GPTQ (arXiv 2210.17323), written as successive rounding in the Cholesky factor of H = X^T X / M:
  H = U U^T, U upper triangular:  ||X (w - q)||^2 = M sum_j (u_jj (t_j - q_j))^2
                                  t_j = w_j + sum_{k<j} (w_k - q_k) u_kj / u_jj
  so q_j = the grid value next to t_j. No inverse of H is formed. Columns go in order of falling h_jj.
The grid is chosen first (grids.py), so blocks may straddle rows and columns go in any order.
Rejected: scales recomputed along the way, as GPTQ does per group (the blocks of the file format run across rows);
rounding each column again given all others, which cannot raise the error but lowered it by less than 1 %.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lofi.quant.grids import Grid, RowGrid, block_grid, row_grid
from lofi.quant.int8 import dequantize_int8
from lofi.quant.kernels.dispatch import kernels_for
from lofi.quant.linear import quantize_4bit
from lofi.quant.nf4 import dequantize_blockwise
from lofi.quant.storage import EightBit, FourBit

ROUNDINGS = ("nearest", "compensated", "stochastic")
DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean: inputs never seen are then worth something, too."""
_TOGETHER = 128  # columns whose effect on the rest is applied in one product


class Gram:
    """H = X^T X / M of the rows that a layer was given, summed in float32."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(width, width, device=device)
        self.rows = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in activations (..., I)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()  # (M, I)
        self._sum.addmm_(rows.t(), rows)
        self.rows += len(rows)

    def matrix(self) -> Tensor:
        """H (I, I), float32; zero where nothing was added."""
        return self._sum / max(self.rows, 1)


@torch.no_grad()
def requantize_4bit(
    weight: Tensor,
    *,
    gram: Tensor | None = None,
    rounding: str = "compensated",
    like: FourBit | None = None,
    double: bool = True,
    block: int = 64,
    seed: int = 0,
) -> FourBit:
    """NF4 of a dense weight (O, I): nearest, compensated for inputs with `gram` = H (I, I), or stochastic.

    `like` is the quantized weight this one was made from: its scales, where they still do, are kept.
    Exact   compensated is never worse than nearest for `gram`
    """
    weight = weight.detach().float().contiguous()
    fresh = quantize_4bit(weight, block=block, double_quant=double)
    if rounding == "nearest":
        return fresh
    if rounding == "stochastic":
        return _drawn(weight, block_grid(weight, fresh, like, None, shrink=()), seed)
    importance = None if gram is None else gram.diagonal()
    return _better(weight, fresh, _compensated(weight, block_grid(weight, fresh, like, importance), gram), gram)


@torch.no_grad()
def requantize_int8(
    weight: Tensor,
    *,
    gram: Tensor | None = None,
    rounding: str = "compensated",
    like: EightBit | None = None,
    seed: int = 0,
) -> EightBit:
    """LLM.int8() codes of a dense weight (O, I), by the roundings of `requantize_4bit`."""
    weight = weight.detach().float().contiguous()
    fresh = kernels_for(weight.device).quantize_weight_rows(weight)
    if rounding == "nearest":
        return fresh
    if rounding == "stochastic":
        return _drawn(weight, row_grid(weight, fresh, like, None), seed)
    grid: RowGrid = row_grid(weight, fresh, like, None if gram is None else gram.diagonal())
    return _better(weight, fresh, _compensated(weight, grid, gram), gram)


def output_error(weight: Tensor, stored: FourBit | EightBit, gram: Tensor | None) -> float:
    """||X (W - Q)^T||_F / ||X W^T||_F for inputs with H = `gram` (for H = I without one), from 0."""
    gap = weight.float() - _values(stored)
    whole = _energy(weight.float(), gram)
    return float((_energy(gap, gram) / whole).sqrt()) if whole > 0 else 0.0


def _energy(rows: Tensor, gram: Tensor | None) -> Tensor:
    """tr(R H R^T)."""
    return (rows * (rows if gram is None else rows @ gram)).sum()


def _values(stored: FourBit | EightBit) -> Tensor:
    if isinstance(stored, FourBit):
        return dequantize_blockwise(stored, torch.float32)
    return dequantize_int8(stored, torch.float32)


def _better(weight: Tensor, nearest: Any, other: Any, gram: Tensor | None) -> Any:
    return other if output_error(weight, other, gram) <= output_error(weight, nearest, gram) else nearest


def _drawn(weight: Tensor, grid: Grid, seed: int) -> Any:
    """Every element one of its two neighbours on the grid, by chance, so that errors average out over a row."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(weight.shape[1], device=weight.device)
    return grid.store(grid.drawn(weight, grid.scales(columns).t(), generator))


def _compensated(weight: Tensor, grid: Grid, gram: Tensor | None) -> Any:
    columns = torch.arange(weight.shape[1], device=weight.device)
    if gram is None:
        return grid.store(grid.nearest(weight, grid.scales(columns).t()))
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    codes = _sweep(weight.t()[order], _coupling(_damped(gram)[order][:, order]), grid, order)
    return grid.store(codes[torch.argsort(order)].t())


def _damped(gram: Tensor) -> Tensor:
    """H with DAMPING of its mean diagonal added; the identity for a layer that saw nothing, or infinities."""
    mean = gram.diagonal().mean()
    if not (mean > 0 and torch.isfinite(gram).all()):
        return torch.eye(len(gram), device=gram.device)
    return gram + torch.eye(len(gram), device=gram.device) * (DAMPING * mean)


def _coupling(damped: Tensor) -> Tensor:
    """u_kj / u_jj above the diagonal, 0 elsewhere, for H = U U^T with U upper triangular; (I, I).

    U is the Cholesky factor of H turned by 180 degrees, turned back. More damping is added where float32 needs it.
    """
    flipped = damped.flip(0, 1)
    extra = damped.diagonal().mean() * DAMPING
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            break
        flipped = flipped + torch.eye(len(flipped), device=flipped.device) * extra
        extra = extra * 10
    upper = lower.flip(0, 1)
    return (upper / upper.diagonal()).triu_(1)


def _sweep(weight: Tensor, coupling: Tensor, grid: Grid, order: Tensor) -> Tensor:
    """Round column after column, each given the errors of the earlier ones; (I, O) -> codes (I, O).

    `weight` and `coupling` are in the order `order`, columns of W as rows, so that each is contiguous.
    """
    error = torch.zeros_like(weight)  # W - Q
    codes = []
    for first in range(0, len(weight), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        wanted = weight[part] + coupling[:first, part].t() @ error[:first]  # (n, O)
        scales = grid.scales(order[part])  # (n, O)
        inside = coupling[part, part]  # (n, n)
        for j in range(len(wanted)):
            code = grid.nearest(wanted[j], scales[j])
            error[first + j] = weight[first + j] - grid.values(code, scales[j])
            wanted[j + 1 :].addr_(inside[j, j + 1 :], error[first + j])
            codes.append(code)
    return torch.stack(codes)
