"""Figures as one PNG, drawn by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lofi.files.atomic import disk_errors
from lofi.report.drawings import Drawing, Heat, number

WIDTH = 9.0  # inches


def write_png(path: str | Path, title: str, drawings: Sequence[Drawing]) -> Path:
    """Draw the figures below each other and write them as one PNG file.

    Raises  LofiError when the disk refuses
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_height(drawing) for drawing in drawings]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(drawings), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, drawing in zip(axes, drawings, strict=True):
        axis.set_title("\n".join(filter(None, [drawing.title, drawing.note])), fontsize=9)
        axis.set_xlabel(drawing.across, fontsize=8)
        axis.tick_params(labelsize=7)
        if isinstance(drawing, Heat):
            _draw_heat(figure, axis, drawing)
        else:
            _draw_lines(axis, drawing.lines)
    with disk_errors(path):
        figure.savefig(path, dpi=130)
    return Path(path)


def _height(drawing: Drawing) -> float:
    return 1.3 + 0.28 * len(drawing.rows) if isinstance(drawing, Heat) else 3.0


def _draw_heat(figure: Any, axis: Any, heat: Heat) -> None:
    values = [[math.nan if value is None else value for value in row] for row in heat.values]
    image = axis.imshow(values, vmin=0, vmax=heat.top or 1, cmap="Blues", aspect="auto")
    axis.set_yticks(range(len(heat.rows)), heat.rows)
    axis.set_xticks(range(len(heat.columns)), heat.columns)
    if len(heat.columns) <= 16:
        for r, row in enumerate(values):
            for c, value in enumerate(row):
                if not math.isnan(value):
                    dark = value > 0.55 * heat.top
                    axis.text(c, r, number(value), ha="center", va="center", fontsize=6, color="w" if dark else "k")
    figure.colorbar(image, ax=axis, fraction=0.03)


def _draw_lines(axis: Any, lines: Mapping[str, Sequence[float]]) -> None:
    for name, line in lines.items():
        held = [(n, value) for n, value in enumerate(line, 1) if value > 0]
        axis.semilogy(*zip(*held, strict=True), label=name, linewidth=1) if held else None
    if len(lines) <= 12:
        axis.legend(fontsize=6, ncols=3)
