"""Small pictures as inline SVG: axes, marks, lines and labels that take their colours from the page.

A picture is 400 units wide and drawn about as wide as a phone: its 13-unit text stays legible there, and wide pages put
two beside each other instead of stretching one. Every mark has its own colour and shape (Wong's colour-blind safe
palette, "Points of view: color blindness", Nature Methods 8, 441, 2011, darkened or lightened by the page) and a
<title>. Knows numbers and names. Knows not arms. Rejected: matplotlib (fixed colours, no dark page, slow to
import).
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lofi.report.curve import ticks
from lofi.study.wording import short

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 44
TEXT = 13  # units; GLYPH is about the width of a character of it
GLYPH = 7.6
COLOURS, SHAPES = 8, 5
DISTINCT = 12
"""More series than this cannot be told apart in one picture."""


@dataclass(frozen=True)
class Axis:
    """A scale from data to units: linear, or logarithmic where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The coordinate of a value, kept on the axis."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self._least())))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers on the axis: powers of ten, with 2 and 5 between where they are few."""
        if not self.log:
            return ticks(self.low, self.high, wanted)
        for parts in ((1,), (1, 3), (1, 2, 5)):
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [part * 10.0**power for power in powers for part in parts]
            found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            if len(found) >= 3:
                return found[:: max(1, math.ceil(len(found) / (wanted + 1)))]
        return found or [self.low, self.high]

    def _least(self) -> float:
        return self.low if self.log else -math.inf


def across(values: Iterable[float], *, log: bool = False, least: float = 0.0) -> Axis:
    """A horizontal axis that holds all values with some room, and spans a share of the largest that is at least `least`
    (so that a difference of one percent does not fill a picture)."""
    return _axis(values, LEFT, WIDTH - RIGHT, log, least)


def upwards(values: Iterable[float]) -> Axis:
    """A vertical axis that holds all values with some room."""
    return _axis(values, HEIGHT - BOTTOM, TOP, False)


def _axis(values: Iterable[float], start: float, end: float, log: bool, least: float = 0.0) -> Axis:
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = min(known), max(known)
    if log:
        room = 1.6 if high / low < 1.01 else (high / low) ** 0.06
        return Axis(low / room, high * room, start, end, True)
    room = max(0.06 * (high - low), 0.5 * (least * abs(high) - (high - low))) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end)


@dataclass(frozen=True)
class Frame:
    """Two axes with what they measure."""

    x: Axis
    y: Axis
    x_name: str
    y_name: str

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x.place(x), self.y.place(y)

    def drawn(self, ticks_x: Sequence[float] | None = None) -> str:
        """Grid, numbers and names; `ticks_x` instead of round numbers where only those values occur."""
        parts = []
        for value in self.y.ticks():
            y = self.y.place(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(text(LEFT - 6, y + 4.5, short(value), "end"))
        for value in _apart(self.x, self.x.ticks() if ticks_x is None else ticks_x):
            x = self.x.place(value)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
            half = GLYPH * len(short(value)) / 2
            parts.append(text(min(x, WIDTH - half), HEIGHT - BOTTOM + 18, short(value), "middle"))
        parts.append(text(6, 14, self.y_name, "start", "axis"))
        parts.append(text(WIDTH - RIGHT, HEIGHT - 6, self.x_name, "end", "axis"))
        return "".join(parts)


def _apart(axis: Axis, values: Sequence[float]) -> list[float]:
    """Those values whose numbers do not run into each other."""
    kept: list[float] = []
    for value in values:
        room = GLYPH * (len(short(value)) + 1)
        if not kept or axis.place(value) - axis.place(kept[-1]) >= room:
            kept.append(value)
    return kept


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """Words at a place; anchor start, middle or end."""
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{html.escape(words)}</text>'


def picture(parts: Iterable[str], label: str) -> str:
    """The <svg>, named for those who cannot see it."""
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}" class="plot">'
    return head + "".join(parts) + "</svg>"


def mark(place: tuple[float, float], series: int, title: str, *, faded: bool = False) -> str:
    """A point in a series' colour and shape, with a title; hollow where the shapes come round again."""
    x, y = place
    css = f"mark c{series % COLOURS}{' hollow' if series // SHAPES % 2 else ''}{' faded' if faded else ''}"
    return f'<g class="{css}">{_shape(series % SHAPES, x, y, 4.5)}<title>{html.escape(title)}</title></g>'


def _shape(kind: int, x: float, y: float, size: float) -> str:
    if kind == 0:
        return f'<circle cx="{x}" cy="{y}" r="{size}"/>'
    if kind == 1:
        return f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}"/>'
    corners = {
        2: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
        3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        4: ((0, 1.3), (1.2, -0.9), (-1.2, -0.9)),
    }[kind]
    return f'<polygon points="{" ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)}"/>'


def swatch(series: int, *, line: bool = False) -> str:
    """A series' mark or line for a legend, as a small <svg>."""
    inner = stroke([(1, 8), (23, 8)], series) if line else mark((12, 8), series, "")
    return f'<svg viewBox="0 0 24 16" class="swatch" aria-hidden="true">{inner.replace("<title></title>", "")}</svg>'


def stroke(places: Sequence[tuple[float, float]], series: int, *, faded: bool = False, title: str = "") -> str:
    """A line through places in a series' colour; beyond the colours the same ones dashed."""
    css = f"line c{series % COLOURS}{' dashed' if series >= COLOURS else ''}{' faded' if faded else ''}"
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    return f'<polyline class="{css}" points="{points}">{inner}</polyline>'


def whisker(x: float, low: float, high: float, series: int, *, faded: bool = False) -> str:
    """The interval of a point, as a vertical line."""
    css = f"whisker c{series % COLOURS}{' faded' if faded else ''}"
    return f'<line class="{css}" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'


def level(frame: Frame, value: float, words: str) -> str:
    """A dashed line across at a value, such as the base's; only the words, with an arrow, where it is off the axis."""
    y, right = frame.y.place(value), WIDTH - RIGHT - 2
    if not frame.y.low <= value <= frame.y.high:
        below = value < frame.y.low
        return text(right, y - 5 if below else y + 14, f"{words} {'↓' if below else '↑'}", "end", "quiet")
    line = f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
    return line + text(right, y - 5 if y > TOP + 20 else y + 15, words, "end", "quiet")


class Labels:
    """Words beside marks that run neither into each other, nor into marks, nor out of the picture."""

    def __init__(self, taken: Iterable[tuple[float, float]]) -> None:
        self.boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y in taken]

    def beside(self, place: tuple[float, float], words: str) -> str:
        """The words at the first free side of a mark; "" where none is free (the title still says it)."""
        x, y = place
        width = GLYPH * len(words)
        sides = (("start", x + 9, y + 4), ("end", x - 9, y + 4), ("middle", x, y - 10), ("middle", x, y + 19))
        slants = (("start", x + 6, y - 8), ("start", x + 6, y + 16), ("end", x - 6, y - 8), ("end", x - 6, y + 16))
        for anchor, at, base in (*sides, *slants):
            left = at - {"start": 0, "end": width, "middle": width / 2}[anchor]
            box = (left, base - 11, left + width, base + 3)
            if self._free(box, own=(x - 6, y - 6, x + 6, y + 6)):
                self.boxes.append(box)
                return text(at, base, words, anchor, "label")
        return ""

    def _free(self, box: tuple[float, ...], own: tuple[float, ...]) -> bool:
        inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 16 and box[3] <= HEIGHT - BOTTOM
        return inside and not any(_meet(box, other) for other in self.boxes if other != own)


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
