"""How alike the subspaces of two adapters are, module by module, beside what chance would give.

Three views of each update s B A: "A", the right-singular vectors of A alone, as LoRA (arXiv 2106.09685) eq. 4 has it;
"input", those of the whole update: what it reads; "output", its left-singular vectors: what it writes. Two seeds whose
A's hardly moved from where they were drawn differ in "A" by chance alone, which is why the other two stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lofi.errors import RequestError

if TYPE_CHECKING:
    from lofi.files.updates import LowRank

VIEWS = ("A", "input", "output")
Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class View:
    """phi(i, j) for i up to the rank of one and j up to that of the other, in a space of a dimension."""

    dimension: int
    grid: Grid
    """grid[i - 1][j - 1] = phi(i, j); rows are the first adapter's."""

    @property
    def full(self) -> float:
        """phi of the first k directions of each, k the smaller rank."""
        return self.grid[self.k - 1][self.k - 1]

    @property
    def k(self) -> int:
        """The smaller rank."""
        return min(len(self.grid), len(self.grid[0]))

    def null(self, i: int, j: int) -> float:
        """What two random subspaces would have: see algebra.expected_similarity."""
        from lofi.adapters.algebra import expected_similarity

        return expected_similarity(i, j, self.dimension)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "dimension": self.dimension,
            "first": self.grid[0][0],
            "null_first": self.null(1, 1),
            "k": self.k,
            "full": self.full,
            "null_full": self.null(self.k, self.k),
            "grid": [list(row) for row in self.grid],
        }


@dataclass(frozen=True)
class Similarity:
    """One module that both adapters update, seen in every view that has something in it."""

    path: str
    shape: tuple[int, int]
    cosine: float
    """<dW1, dW2> / (||dW1|| ||dW2||) of the updates themselves; 0 where one is zero."""
    views: dict[str, View]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        views = {name: view.to_dict() for name, view in self.views.items()}
        return {"module": self.path, "shape": list(self.shape), "cosine": self.cosine, "views": views}


def similarities_of(one: Any, other: Any) -> list[Similarity]:
    """The modules that two AdapterFolders both update, with the similarity of their subspaces.

    Of fused experts, the mean over the experts.
    Raises  RequestError where they update no module of the same shape both
    """
    from lofi.files.updates import low_rank_updates

    mine, yours = ({update.name: update for update in low_rank_updates(folder)} for folder in (one, other))
    both = [name for name in mine if name in yours and mine[name].shape == yours[name].shape]
    if not both:
        raise RequestError(
            f"{one.path} and {other.path} update no module of the same name and shape both, so their subspaces cannot "
            "be compared; give two LoRA adapters of one base with targets in common"
        )
    return [_compared(mine[name], yours[name]) for name in both]


def _compared(one: LowRank, other: LowRank) -> Similarity:
    import torch

    from lofi.adapters.algebra import similarities

    bases = [[_bases(update, number) for number in range(len(update.pairs))] for update in (one, other)]
    sizes = {"A": one.shape[1], "input": one.shape[1], "output": one.shape[0]}
    views = {}
    for name in VIEWS:
        grids = [
            similarities(mine[name], yours[name])
            for mine, yours in zip(*bases, strict=True)
            if mine[name].shape[1] and yours[name].shape[1]
        ]
        if grids:
            rows, columns = (min(grid.shape[place] for grid in grids) for place in (0, 1))
            mean = torch.stack([grid[:rows, :columns] for grid in grids]).mean(0)
            views[name] = View(sizes[name], tuple(map(tuple, mean.tolist())))
    return Similarity(one.name, one.shape, _cosine(one, other), views)


def _cosine(one: LowRank, other: LowRank) -> float:
    from lofi.adapters.algebra import inner, norm

    sizes = math.prod(math.hypot(*(norm(a, b) for a, b in update.pairs)) for update in (one, other))
    products = sum(inner(mine, yours) for mine, yours in zip(one.pairs, other.pairs, strict=True))
    return math.copysign(1.0, one.scale * other.scale) * products / sizes if sizes else 0.0


def _bases(update: LowRank, number: int) -> dict[str, Any]:
    """Orthonormal columns by view, best direction first; none for what is zero."""
    from lofi.adapters.algebra import alive, product_svd, right_vectors

    a, b = update.pairs[number]
    svd = product_svd(a, b, update.scale)
    k = alive(svd.s)
    of_a = right_vectors(a)
    return {
        "A": of_a if a.any() else of_a[:, :0],
        "input": svd.vh[:k].t(),
        "output": svd.u[:, :k],
    }


def mean_view(found: Sequence[Similarity], view: str) -> View | None:
    """The mean grid over all modules, as far as all have one; the dimension is the one whose null is the mean null."""
    views = [one.views[view] for one in found if view in one.views]
    if not views:
        return None
    rows, columns = min(len(v.grid) for v in views), min(len(v.grid[0]) for v in views)
    grid = tuple(tuple(sum(v.grid[i][j] for v in views) / len(views) for j in range(columns)) for i in range(rows))
    return View(round(len(views) / sum(1 / v.dimension for v in views)), grid)
