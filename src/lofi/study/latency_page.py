"""The page of a latency study: a table and bars, a block for each setting of batch and sequence.

Knows rows {who, batch, sequence, ms, low, high, ratio, ratio_low, ratio_high}. Knows not how time was
taken (`latency`).
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lofi.files.atomic import write_text
from lofi.study.drawing import GLYPH, WIDTH, text
from lofi.study.page import REPORT, TABLE, machine, render
from lofi.study.wording import between, number, short

Row = Mapping[str, Any]
STEP, HEAD, FOOT = 34, 8, 30  # units: a bar with its name, above the first, below the last
NAMES_END, BARS_END = 12, WIDTH - 64


def write_latency(rows: Sequence[Row], about: Mapping[str, Any], output: str | Path) -> Path:
    """Write results.csv and report.html of a latency study, each atomically; the page's path."""
    output = Path(output)
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]) if rows else ["who"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(output / TABLE, written.getvalue())
    write_text(output / REPORT, latency_page(rows, about))
    return output / REPORT


def latency_page(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The page as text.

    rows   one for each setting and side; `ms` and `ratio` with 95 % intervals (None where there are none)
    about  what was timed and how, {what: text}, shown in this order; "title" heads the page, where it is given
    """
    settings: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        settings.setdefault((row["batch"], row["sequence"]), []).append(row)
    blocks = [
        {"title": f"Batch {batch}, sequence {sequence}", "bars": bars(block), "rows": [_cells(row) for row in block]}
        for (batch, sequence), block in settings.items()
    ]
    facts = {what: str(how) for what, how in about.items() if what != "title"} | dict(machine())
    return render("latency.html.j2", title=about.get("title", "Latency"), blocks=blocks, about=facts)


def _cells(row: Row) -> dict[str, tuple[str, str]]:
    """head -> what is read, and the line below it."""
    parameters = {"parameters": (short(row["parameters"]), "")} if "parameters" in row else {}
    return {
        "side": (str(row["who"]), ""),
        "ms": (number(row["ms"]), _interval(row["low"], row["high"])),
        "× base": (f"{row['ratio']:.3f}", _interval(row["ratio_low"], row["ratio_high"], 3)),
        **parameters,
    }


def _interval(low: float | None, high: float | None, digits: int | None = None) -> str:
    if low is None or high is None:
        return ""
    return between(low, high) if digits is None else f"{low:.{digits}f} to {high:.{digits}f}"


def bars(rows: Sequence[Row]) -> str:
    """Milliseconds as horizontal bars from zero, with their intervals; "" where there are none to compare."""
    if len(rows) < 2:
        return ""
    most = max(row["high"] if row["high"] is not None else row["ms"] for row in rows)
    scale = (BARS_END - NAMES_END) / most
    height = HEAD + STEP * len(rows) + FOOT - 22
    parts = [_bar(row, HEAD + STEP * place, scale) for place, row in enumerate(rows)]
    label = html.escape("Milliseconds of each, from zero")
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}" class="plot">'
    return head + "".join(parts) + "</svg>"


def _bar(row: Row, y: float, scale: float) -> str:
    """A name, a bar below it, its interval, and the ratio at its end."""
    end = NAMES_END + row["ms"] * scale
    middle = y + 23
    title = html.escape(f"{row['who']}: {number(row['ms'])} ms ({between(row['low'], row['high'])})")
    css = "bar base" if row["who"] == "base" else "bar"
    parts = [text(NAMES_END, y + 11, _cut(str(row["who"])), "start", "label")]
    parts.append(
        f'<rect class="{css}" x="{NAMES_END}" y="{y + 16}" width="{end - NAMES_END:.1f}" height="14">'
        f"<title>{title}</title></rect>"
    )
    reach = end
    if row["low"] is not None and row["high"] is not None:
        low, reach = NAMES_END + row["low"] * scale, NAMES_END + row["high"] * scale
        parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{reach:.1f}" y1="{middle}" y2="{middle}"/>')
    parts.append(text(max(end, reach) + 5, middle + 4.5, f"{row['ratio']:.2f} ×", "start", "label"))
    return "".join(parts)


def _cut(name: str) -> str:
    room = int((WIDTH - NAMES_END) / GLYPH) - 2
    return name if len(name) <= room else name[: room - 1] + "…"
