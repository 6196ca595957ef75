"""What each update of an adapter folder is made of: its singular values, without ever forming the full matrix.

Knows  pairs of factors under PEFT's names. Knows not  models: scale and rank come from the folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?A(\.weight)?$")


@dataclass(frozen=True)
class Update:
    """One update s B A: `shape` (O, I), `scale` s, `values` the singular values of s B A, largest first."""

    path: str
    shape: tuple[int, int]
    rank: int
    scale: float
    values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm: the root of the sum of the squared singular values."""
        return sum(value * value for value in self.values) ** 0.5

    @property
    def directions(self) -> int:
        """How many singular values carry 90 % of the squared norm; 0 for an update that is zero."""
        goal, carried = 0.9 * self.norm**2, 0.0
        for count, value in enumerate(self.values, 1):
            carried += value * value
            if carried >= goal:
                return count if carried > 0 else 0
        return len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "module": self.path,
            "shape": list(self.shape),
            "rank": self.rank,
            "scale": self.scale,
            "norm": self.norm,
            "directions_for_90_percent": self.directions,
            "singular_values": list(self.values),
        }


def updates_of(folder: Any) -> list[Update]:
    """The updates of an AdapterFolder, in the order of its modules; fused experts are left out (they are many pairs).

    The effective scale is what lofi.json states, else what the config's alpha, rank and patterns give.
    """
    found = []
    for key, a in folder.tensors.items():
        match = _FACTOR.fullmatch(key)
        b = folder.tensors.get(key.replace("_A", "_B")) if match else None
        if match is None or b is None or b.shape[1] != a.shape[0] or _fused(folder, match["path"]):
            continue
        path = match["path"].removeprefix("base_model.model.")
        rank = a.shape[0]
        scale = float(folder.record.get("scale", {}).get(path) or _scale(folder.config, path, rank))
        found.append(Update(path, (b.shape[0], a.shape[1]), rank, scale, singular_values(a, b, scale)))
    return sorted(found, key=lambda update: _natural(update.path))


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]


def singular_values(a: Any, b: Any, scale: float) -> tuple[float, ...]:
    """Singular values of scale * B A from the R x R core of its factors.

    B = Qb Rb, A^T = Qa Ra  =>  s B A = Qb (s Rb Ra^T) Qa^T, so the values are those of s Rb Ra^T
    Shapes  a (R, I), b (O, R); float64 arithmetic
    Exact   to float64 rounding: Qa and Qb have orthonormal columns
    """
    import torch

    core_b = torch.linalg.qr(b.double(), mode="r").R
    core_a = torch.linalg.qr(a.double().T, mode="r").R
    return tuple(torch.linalg.svdvals(scale * core_b @ core_a.T).tolist())


def _scale(config: Any, path: str, rank: int) -> float:
    from lofi.adapters.target import by_pattern

    return config.scale(rank, by_pattern(path, config.alpha_pattern, config.lora_alpha))


def _fused(folder: Any, path: str) -> bool:
    names = folder.config.target_parameters or ()
    return any(path.endswith(name.rpartition(".")[0]) for name in names)
