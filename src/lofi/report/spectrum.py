"""What each update of an adapter folder is made of, and what it does to its weight, without ever forming the update.

Knows  updates as files/updates.py reads them, and weights that it is given. Knows not  models or how to open one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lofi.adapters.algebra import Amplification
    from lofi.files.updates import LowRank

Weights = Callable[["LowRank"], Sequence["Tensor"]]
"""The base's weight (O, I) that an update is added to, as B A stands; one for each expert."""
WIDEST = 1024
"""Of the smaller side of a weight whose intruder dimensions are counted."""


@dataclass(frozen=True)
class Update:
    """One update s B A: `shape` (O, I), `scale` s, `values` the singular values of s B A, largest first.

    Of fused experts, `values` are the roots of their mean squares over the experts.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    scale: float
    values: tuple[float, ...]
    experts: int = 1
    beside: Amplification | None = None
    """The figures beside the base's weight, where there is a base."""
    intruders: int | None = None
    """Intruder dimensions that the update makes in its weight, where they were counted: see algebra.intruders."""

    @property
    def norm(self) -> float:
        """Frobenius norm: the root of the sum of the squared singular values, over all experts."""
        return (self.experts * sum(value * value for value in self.values)) ** 0.5

    @property
    def relative(self) -> float | None:
        """||s B A||_F / ||W||_F; None without a base."""
        return self.norm / self.beside.whole if self.beside and self.beside.whole else None

    @property
    def directions(self) -> int:
        """How many singular values carry 90 % of the squared norm; 0 for an update that is zero."""
        goal, carried = 0.9 * self.norm**2 / self.experts, 0.0
        for count, value in enumerate(self.values, 1):
            carried += value * value
            if carried >= goal:
                return count if carried > 0 else 0
        return len(self.values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values: see algebra.entropy_rank."""
        return _of(self.values, "entropy_rank")

    @property
    def stable_rank(self) -> float:
        """||.||_F^2 / ||.||_2^2."""
        return _of(self.values, "stable_rank")

    @property
    def dead(self) -> int:
        """Directions of the factors that add nothing."""
        return self.rank - int(_of(self.values, "alive"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        beside = self.beside
        return {
            "module": self.path,
            "shape": list(self.shape),
            "rank": self.rank,
            "scale": self.scale,
            "norm": self.norm,
            "directions_for_90_percent": self.directions,
            "singular_values": list(self.values),
            "experts": self.experts,
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "dead_directions": self.dead,
            "relative_norm": self.relative,
            "intruder_dimensions": self.intruders,
            "amplification": None if beside is None else beside._asdict() | {"factor": beside.factor},
        }


def _of(values: Sequence[float], what: str) -> float:
    import torch

    from lofi.adapters import algebra

    return getattr(algebra, what)(torch.tensor(values, dtype=torch.float64))


def updates_of(folder: Any, weights: Weights | None = None, *, intruding: bool = False) -> list[Update]:
    """The updates of an AdapterFolder, layer 2 before layer 10; beside their weights where `weights` gives them.

    `intruding` counts intruder dimensions too, of weights no wider than `WIDEST`: two full decompositions each.
    """
    from lofi.files.updates import low_rank_updates

    return [_judged(update, weights, intruding) for update in low_rank_updates(folder)]


def _judged(update: LowRank, weights: Weights | None, intruding: bool) -> Update:
    import torch

    from lofi.adapters.algebra import intruders, product_svd

    svds = [product_svd(a, b, update.scale) for a, b in update.pairs]
    values = tuple(torch.stack([svd.s for svd in svds]).square().mean(0).sqrt().tolist())
    plain = Update(update.name, update.shape, update.rank, update.scale, values, len(update.pairs))
    if weights is None:
        return plain
    beside = list(zip(svds, weights(update), strict=True))
    counted = intruding and min(update.shape) <= WIDEST
    count = sum(intruders(svd, weight) for svd, weight in beside) if counted else None
    return replace(plain, beside=_together(beside), intruders=count)


def _together(pairs: Sequence[tuple[Any, Tensor]]) -> Amplification:
    """The figures of all experts as one: roots of sums of squares."""
    from lofi.adapters.algebra import Amplification, amplification

    each = [amplification(svd, weight) for svd, weight in pairs]
    return Amplification(*(math.hypot(*values) for values in zip(*each, strict=True)))


def singular_values(a: Tensor, b: Tensor, scale: float) -> tuple[float, ...]:
    """Singular values of scale * B A, largest first: see algebra.singular_values."""
    from lofi.adapters import algebra

    return tuple(algebra.singular_values(a, b, scale).tolist())
