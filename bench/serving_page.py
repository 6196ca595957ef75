"""docs/serving.md: the prose of serving.template.md with figures, curve and picture from the kept results in place.

A place is a line `<!-- NAME -->`; one that the template lacks, or a name that nobody fills, is an error. The picture is
docs/serving-curve.svg, drawn from the same figures as the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.groups import NEEDS_A_GPU
from bench.page import HERE, asked, cells, kept_file, section, summary

TEMPLATE = HERE / "serving.template.md"
CURVE = "serving-curve.svg"
SIZING = "serve_sizing"
_COLUMNS = ("clients", "tokens/s", "first token, ms", "p95", "per token, ms", "p95")


def write_serving_page(claims: Sequence[str], page: Path, template: Path = TEMPLATE) -> None:
    """Write the page and its picture from the figures that exist; claims without any are named as missing."""
    there = {name: json.loads(kept_file(name).read_text()) for name in claims if kept_file(name).exists()}
    points = [row["curve"] for row in there.get(SIZING, {}).get("rows", ()) if "curve" in row]
    page.parent.mkdir(exist_ok=True)
    if points:
        draw(points, page.parent / CURVE)
    parts = {
        "summary": summary(list(there.values())),
        "curve": curve_table(points, there.get(SIZING)) if points else "Not measured yet.\n",
        "figures": "\n".join(f"#{section(name, entry)}" for name, entry in there.items()),
        "missing": missing([name for name in claims if name not in there]),
    }
    page.write_text(filled(template.read_text(encoding="utf-8"), parts), encoding="utf-8")


def filled(template: str, parts: dict[str, str]) -> str:
    """The template with each place filled.  Raises  ValueError where places and parts are not the same names"""
    places = re.findall(r"^<!-- (\w+) -->$", template, re.MULTILINE)
    if sorted(places) != sorted(parts):
        raise ValueError(f"the template has the places {places}, expected {', '.join(parts)} once each")
    return re.sub(r"^<!-- (\w+) -->$", lambda found: parts[found[1]].rstrip("\n"), template, flags=re.MULTILINE)


def curve_table(points: Sequence[dict[str, Any]], entry: dict[str, Any] | None) -> str:
    """A table a model: clients, tokens a second, and both latencies."""
    lines = [f"![Throughput and latency by number of clients]({CURVE})", ""]
    for model in dict.fromkeys(point["model"] for point in points):
        lines += [f"{model}:", "", cells(_COLUMNS), cells(["---:"] * len(_COLUMNS))]
        for point in points:
            if point["model"] == model:
                lines.append(cells(_numbers(point)))
        lines.append("")
    told = f"*{entry['date']}, on {entry['machine']}.*" if entry else ""
    return "\n".join([*lines, told])


def _numbers(point: dict[str, Any]) -> list[str]:
    both = [f"{value:.1f}" for value in point["first_ms"]] + [f"{value:.2f}" for value in point["token_ms"]]
    return [str(point["clients"]), f"{point['tokens_per_second']:,.0f}", *both]


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: tokens a second, and the median and 95th percentile of a token's time, by number of clients."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "lofi", "svg.fonttype": "none", "font.size": 9}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        speed, delay = figure.subplots(1, 2)
        for place, model in enumerate(dict.fromkeys(point["model"] for point in points)):
            mine = [point for point in points if point["model"] == model]
            clients = [point["clients"] for point in mine]
            look = {"color": ("#0072b2", "#d55e00", "#009e73")[place % 3], "marker": "os^"[place % 3], "markersize": 4}
            speed.plot(clients, [point["tokens_per_second"] for point in mine], label=model, **look)
            delay.plot(clients, [point["token_ms"][0] for point in mine], label=f"{model}, median", **look)
            delay.plot(clients, [point["token_ms"][1] for point in mine], label=f"{model}, p95", ls="--", **look)
        for axes, title in ((speed, "tokens a second"), (delay, "milliseconds between tokens")):
            axes.set(xscale="log", xlabel="clients at once", title=title, ylim=(0, None))
            ticks = sorted({point["clients"] for point in points})
            axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def missing(names: Sequence[str]) -> str:
    """The claims without figures, and the command for each."""
    if not names:
        return "Every claim has been measured."
    lines = []
    for name in names:
        needs = ": needs a CUDA or ROCm GPU, which the machine above has not" if name in NEEDS_A_GPU else ""
        lines.append(f"- {asked(name)[0]} (`make bench ONLY={name}`){needs}")
    return "\n".join(["Not measured yet:", "", *lines])
