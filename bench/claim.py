"""What one line of a claim says: a figure, the goal beside it, whether it was reached, and the peer's figure.

A goal is data: "<= 1.25", ">= 8" or "0.072798 +- 0.5 %"; a line without one is context.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bench.paired import Ratio

Figure = Ratio | float


def line(
    what: str,
    value: Figure,
    *,
    goal: str | None = None,
    peer: Figure | None = None,
    unit: str = "",
    detail: str = "",
    times_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One row of a claim; `peer` is the same figure of the other library, measured in the same run."""
    number = value.value if isinstance(value, Ratio) else float(value)
    times = {side: round(ms, 3) for side, ms in (times_ms or {}).items()}
    return {
        "what": what,
        "value": number,
        "ours": shown(value, unit),
        "peer": None if peer is None else shown(peer, unit),
        "goal": goal if goal is None or not unit else f"{goal} {unit}",
        "reached": None if goal is None else reached(number, goal),
        "detail": "; ".join(filter(None, [detail, _times(times)])),
        "times_ms": times,
    }


def shown(figure: Figure, unit: str = "") -> str:
    """A figure as the page prints it; a whole number is a count."""
    if isinstance(figure, Ratio):
        text = str(figure)
    else:
        text = f"{figure:,}" if isinstance(figure, int) else f"{figure:,.{_digits(figure)}f}"
    return f"{text} {unit}".rstrip()


def reached(value: float, goal: str) -> bool:
    """Whether a figure reaches its goal: "<= x", ">= x", or "x +- p %"."""
    if found := re.fullmatch(r"(<=|>=) ([\d.]+)", goal):
        bound = float(found[2])
        return value <= bound if found[1] == "<=" else value >= bound
    if found := re.fullmatch(r"([\d.]+) \+- ([\d.]+) %", goal):
        return abs(value / float(found[1]) - 1) <= float(found[2]) / 100
    raise ValueError(f"a goal reads '<= x', '>= x' or 'x +- p %', not {goal!r}")


def _times(times: Mapping[str, float]) -> str:
    return ", ".join(f"{side} {ms:.3g} ms" if ms < 1000 else f"{side} {ms:,.0f} ms" for side, ms in times.items())


def _digits(figure: float) -> int:
    """Six digits for small errors, three around one, none for large counts."""
    size = abs(figure)
    return 6 if size < 0.1 else 3 if size < 10 else 1 if size < 1000 else 0
