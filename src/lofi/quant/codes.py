"""The code books: which sixteen (or 256) numbers the codes stand for.

They are written down, or built, so that they equal bitsandbytes' to the last bit, because a checkpoint is only the same
model if its codes mean the same numbers.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by bit pattern; 1 sign, 2 exponent, 1 mantissa bit, x 12
KINDS = ("nf4", "fp4")


def nf4_code() -> Tensor:
    """The NormalFloat values, ascending: float32 (16,).   QLoRA (arXiv 2305.14314), appendix E

    Exact   bitsandbytes' to the bit; `normal_quantiles` derives them to 7 digits
    """
    return _constant("nf4").clone()


def fp4_code() -> Tensor:
    """bitsandbytes' 4-bit float in the order of its bit patterns: float32 (16,); read, never written."""
    return _constant("fp4").clone()


def code_of(kind: str) -> Tensor:
    """The sixteen values of "nf4" or "fp4", float32 (16,)."""
    return _constant(kind).clone()


def dynamic_code() -> Tensor:
    """The signed dynamic 8-bit code, ascending: float32 (256,), in which double quantization stores block scales.

    For each exponent e = -6..0 the interval (0.1, 1] is cut into 2^(6 + e) equal parts whose midpoints, times 10^e and
    either sign, are values; 0 and 1 are added.   8-bit approximations (arXiv 1511.04561), as bitsandbytes builds it
    """
    return _constant("dynamic").clone()


def normal_quantiles(offset: float = 0.9677083) -> list[float]:
    """NF4 derived: quantiles of N(0, 1), 8 above and 7 below zero at even steps from `offset` to 1/2, over the largest.

    Equation 4 of the paper read literally gives other numbers; this is what its authors' code computes.
    """
    normal = NormalDist()
    above = [normal.inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = sorted([*below, 0.0, *above])
    return [value / values[-1] for value in values]


@cache
def _constant(kind: str) -> Tensor:
    with torch.device("cpu"):  # kept for good, whatever device is the default while it is first asked for
        if kind == "nf4":
            return torch.tensor(_NF4, dtype=torch.float32)
        if kind == "fp4":
            half = torch.tensor(_FP4, dtype=torch.float32)
            return torch.cat([half, -half]) / half.max()
        return _dynamic()


def _dynamic() -> Tensor:
    values: list[float] = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = 10 ** (power - 6) * middles  # in float32: the rounding is part of the code
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
