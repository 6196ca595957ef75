"""Figures as data (heat maps and lines) and as inline SVG that takes its colours from the page. PNG: png.py."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lofi.report.curve import ticks

WIDTH, LABELS, GAP = 720, 92, 2
LOW_CELL, HIGH_CELL = 18, 44


@dataclass(frozen=True)
class Heat:
    """A map of numbers from 0 to `top` by row and column; None where there is none."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    top: float
    note: str = ""
    across: str = ""
    """What the columns are."""


@dataclass(frozen=True)
class Lines:
    """Named lines over 1, 2, 3, ...; `logarithmic` in height."""

    title: str
    lines: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""
    across: str = ""


Drawing = Heat | Lines


def svg(drawing: Drawing) -> str:
    """The figure as an <svg>; every cell and line tells its numbers when pointed at."""
    return _heat(drawing) if isinstance(drawing, Heat) else _lines(drawing)


def number(value: float) -> str:
    """Three digits, without a leading 0."""
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"
    return text.removeprefix("0") if 0 < value < 1 else text


def _heat(heat: Heat) -> str:
    across = max(1, len(heat.columns))
    cell = max(LOW_CELL, min(HIGH_CELL, (WIDTH - LABELS) / across))
    tall = min(cell, 30.0)
    width, height = LABELS + cell * across, 20 + tall * len(heat.rows) + 20
    parts = [_text(LABELS + cell * (n + 0.5), 14, name, "middle") for n, name in _spread(heat.columns, cell)]
    for r, (name, values) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = 20 + tall * r
        parts.append(_text(LABELS - 8, y + tall / 2 + 4, name, "end"))
        for c, value in enumerate(values):
            parts.append(_cell(heat, (LABELS + cell * c, y, cell, tall), (name, heat.columns[c]), value))
    parts.append(_text(width, height - 4, heat.across, "end"))
    return _svg(width, height, heat.title, parts)


def _cell(heat: Heat, box: tuple[float, float, float, float], names: tuple[str, str], value: float | None) -> str:
    if value is None:
        return ""
    x, y, width, height = box
    share = min(1.0, max(0.0, value / heat.top)) if heat.top > 0 else 0.0
    title = html.escape(f"{names[0]}, {names[1]}: {value:.4g}")
    inked = f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle" '
    inked += f'class="{"on" if share > 0.55 else "off"}">{number(value)}</text>'
    return (
        f'<g><title>{title}</title><rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{width - GAP:.1f}" '
        f'height="{height - GAP:.1f}"/><rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{width - GAP:.1f}" '
        f'height="{height - GAP:.1f}" fill-opacity="{share:.3f}"/>{inked if width >= 34 else ""}</g>'
    )


def _spread(names: Sequence[str], cell: float) -> list[tuple[int, str]]:
    """As many names as fit."""
    every = max(1, math.ceil(26 / cell))
    return [(n, name) for n, name in enumerate(names) if n % every == 0]


def _lines(drawing: Lines) -> str:
    width, height, left, bottom = WIDTH, 280, 56, 34
    longest = max(len(line) for line in drawing.lines.values())
    points = [math.log10(value) for line in drawing.lines.values() for value in line if value > 0]
    low, high = math.floor(min(points, default=0.0)), max(math.ceil(max(points, default=0.0)), 0)
    high = high if high > low else low + 1

    def place(n: int, value: float) -> str:
        x = left + (width - left - 12) * (n / max(1, longest - 1))
        return f"{x:.1f},{12 + (height - 12 - bottom) * (high - math.log10(value)) / (high - low):.1f}"

    parts = []
    for power in range(low, high + 1, max(1, (high - low) // 6)):
        y = 12 + (height - 12 - bottom) * (high - power) / (high - low)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"1e{power}" if abs(power) > 2 else f"{10.0**power:g}", "end"))
    for tick in ticks(1, longest, 8):
        parts.append(_text(float(place(int(tick) - 1, 1.0).split(",")[0]), height - bottom + 18, f"{tick:g}", "middle"))
    for name, line in drawing.lines.items():
        path = " ".join(place(n, value) for n, value in enumerate(line) if value > 0)
        parts.append(f'<polyline class="spectrum" points="{path}"><title>{html.escape(name)}</title></polyline>')
    parts.append(_text(width - 12, height - 4, drawing.across, "end"))
    return _svg(width, height, drawing.title, parts)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>' if words else ""


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(title)}" class="drawing" '
    style = f'style="max-width:{width:.0f}px;min-width:{0.72 * width:.0f}px"'  # narrower, it scrolls: see the numbers
    return f"{head}{style}>{''.join(parts)}</svg>"
