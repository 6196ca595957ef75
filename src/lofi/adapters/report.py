"""What attaching an adapter did, in numbers and in words: the proof that every requested target matched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lofi.adapters.surgery import Part


@dataclass
class Resolved:
    """What a config means in one model, before anything is touched."""

    parts: dict[str, Part]
    """By the path of the module that each is to be attached to."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Match:
    """One adapted module: where, of which kind, its weight's shape, and the update's rank and effective multiplier."""

    path: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    scale: float | None


@dataclass
class AttachReport:
    """What an adapter matched, what it left out and why, and how much of the model it trains."""

    name: str
    matched: list[Match]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of weights that a reader might expect to be adapted and are not."""
    notes: list[str] = field(default_factory=list)
    trainable: int = 0
    total: int = 0

    def __str__(self) -> str:
        kinds = Counter((m.path.rsplit(".", 1)[-1], m.kind, m.r, m.scale) for m in self.matched)
        lines = [
            f"adapter {self.name!r}: {self.trainable:,} of {self.total:,} parameters train "
            f"({100 * self.trainable / max(self.total, 1):.4g} %), in {len(self.matched)} modules"
        ]
        for (leaf, kind, r, scale), count in sorted(kinds.items(), key=str):
            update = f", r={r}, multiplier {scale:g}" if r is not None else ""
            lines.append(f"  {count} x {leaf} ({kind}{update})")
        reasons = Counter(reason for _, reason in self.left_out)
        lines += [f"  left out: {count} x {reason}" for reason, count in reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for `--json` and the run folder."""
        return {
            "name": self.name,
            "matched": [vars(match) for match in self.matched],
            "left_out": [list(pair) for pair in self.left_out],
            "notes": list(self.notes),
            "trainable": self.trainable,
            "total": self.total,
        }
