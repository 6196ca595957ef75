"""The loss curve as inline SVG that takes its colours from the page.

Knows  rows of metrics.jsonl ("step" with "loss" or "eval_loss"). Knows not  files.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 36
Point = tuple[float, float]


def loss_curve(rows: Iterable[Mapping[str, Any]]) -> str:
    """An <svg> of training loss (line) and validation loss (line with dots) over steps; "" where there is no loss.

    Points that are not finite are left out.
    """
    rows = list(rows)
    series = {"training": points(rows, "loss"), "validation": points(rows, "eval_loss")}
    everything = [point for line in series.values() for point in line]
    if not everything:
        return ""
    box = _Box.around(everything)
    parts = [_axes(box)]
    parts += [_line(box, name, line) for name, line in series.items() if line]
    label = html.escape(f"Loss over {int(box.high_x)} steps")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" class="curve">'
    return head + "".join(parts) + "</svg>"


def points(rows: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has a finite number under `key`."""
    found = [(row.get("step"), row.get(key)) for row in rows]
    return [
        (float(step), float(value))
        for step, value in found
        if isinstance(step, (int, float)) and isinstance(value, (int, float)) and math.isfinite(value)
    ]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `wanted` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Box:
    """The data's bounds and their place on the page."""

    def __init__(self, low_x: float, high_x: float, low_y: float, high_y: float) -> None:
        self.low_x, self.high_x, self.low_y, self.high_y = low_x, high_x, low_y, high_y

    @classmethod
    def around(cls, line: Sequence[Point]) -> _Box:
        xs, ys = [x for x, _ in line], [y for _, y in line]
        low, high = min(0.0, *ys), max(ys)  # from zero: a curve that starts elsewhere exaggerates
        return cls(min(0.0, *xs), max(max(xs), 1.0), low, high + 0.05 * (high - low or 1.0))

    def place(self, point: Point) -> Point:
        x = LEFT + (point[0] - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)


def _axes(box: _Box) -> str:
    parts = []
    for value in ticks(box.low_y, box.high_y):
        _, y = box.place((box.low_x, value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in ticks(box.low_x, box.high_x, 8):
        x, _ = box.place((value, box.low_y))
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">optimizer steps</text>')
    return "".join(parts)


def _line(box: _Box, name: str, line: Sequence[Point]) -> str:
    placed = [box.place(point) for point in line]
    path = " ".join(f"{x},{y}" for x, y in placed)
    parts = [f'<polyline class="{name}" points="{path}"/>']
    if name == "validation" or len(line) == 1:
        for (x, y), (step, value) in zip(placed, line, strict=True):
            title = f"<title>step {step:g}: {name} loss {value:.4f}</title>"
            parts.append(f'<circle class="{name}" cx="{x}" cy="{y}" r="3.5">{title}</circle>')
    return "".join(parts)
