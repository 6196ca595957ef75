"""DoRA: the length of every row of the adapted weight trains on its own, beside the direction that LoRA turns.

    W' = m (W0 + s B A) / n,   n = the length of each row of W0 + s B A      DoRA (arXiv 2402.09353), eq. 5

m (O,) is trained and starts as n; n counts as a constant in the gradient (section 4.3). In the layer this is
y + (m / n - 1) (y - bias) with y = x (W0 + s B A)^T + bias: the factor is exactly zero at step 0, so the model starts
as its base bit for bit. n comes from the factors, n^2 = |W0|^2 + 2 s <W0, B A> + s^2 |B A|^2 row by row, in float32;
the delta (O, I) is never formed. With dropout the base sees x and the rest drop(x), as PEFT has it. After a shifted
start (init.py) the same holds of its factors.
"The length of a row" is what the paper calls the column norm: its weights are (I, O), torch's (O, I).
Rejected: keeping n between calls (an optimizer that writes through raw pointers moves the factors unseen).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1024  # rows that are float32 at once, where the weight is not


def row_squares(weight: Tensor) -> Tensor:
    """|W|^2 of every row (O,) of a weight (O, I), in float32 (float64 for float64)."""
    return torch.cat([rows.square().sum(1) for rows in _wide_rows(weight, torch.float32)])


def row_lengths(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A| of every row, without forming B A.

    Shapes  weight (O, I), squares (O,): its `row_squares`, a (R, I), b (O, R) -> (O,)
    Exact   equal to the formed rows' lengths up to rounding in float32, unless s B A all but cancels W
    """
    wide = torch.promote_types(a.dtype, squares.dtype)
    a, b = a.to(wide), b.to(wide)
    frozen = torch.cat([rows @ a.t() for rows in _wide_rows(weight, wide)])  # (O, R): W A^T
    cross = (b * frozen).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    return (squares + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()


def stretch(magnitude: Tensor, lengths: Tensor) -> Tensor:
    """m / n - 1 (O,): what is added of the output; 0 for a row of length 0, whose direction says nothing."""
    return torch.where(lengths > 0, magnitude / torch.where(lengths > 0, lengths, 1.0) - 1, 0.0)


def delta(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """W' - W0 (O, I) of a weight and its formed update s B A, in the update's dtype."""
    whole = weight.to(update.dtype) + update
    lengths = torch.linalg.vector_norm(whole, dim=1)
    return update + stretch(magnitude, lengths)[:, None] * whole


def _wide_rows(weight: Tensor, least: torch.dtype) -> Iterator[Tensor]:
    """The rows of a weight a block at a time, no narrower than `least`."""
    dtype = torch.promote_types(weight.dtype, least)
    return (rows.to(dtype) for rows in weight.split(_BLOCK))
