"""report.html: what a run was asked for, what it chose, how the loss went, the figures, the data as the model saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lofi.files.atomic import write_text
from lofi.files.lines import read_json_lines
from lofi.report.curve import loss_curve

Row = Mapping[str, Any]  # {"who", "metric", "value", "low", "high", "n"}
Spans = Sequence[tuple[str, str]]  # (text, "trained" | "context" | "pad" | "cut")


def write_report(
    folder: str | Path,
    *,
    title: str,
    figures: Sequence[Row] = (),
    notes: Sequence[str] = (),
    samples: Sequence[Spans] | None = None,
    proofs: Sequence[str] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    log: Sequence[str] = (),
) -> Path:
    """Write `folder`/report.html from the run folder and what is passed in, and return its path.

    Reads    recipe.yaml (settings with their origin), metrics.jsonl (the loss curve), chosen.json (what was chosen
             automatically) where they exist
    figures  rows as `--json` prints them: {"who", "metric", "value", "low", "high", "n"}, a column for each who
    notes    sentences under the title; proofs  sentences in a list of their own
    samples  rows of data as spans (text, kind) with kind trained, context, pad or cut
    tables   further tables by heading, each a list of rows with the same keys (a demo's questions and answers)
    log      lines that the run said, folded away at the end
    The page is one file: no script, nothing from outside, light or dark as the reader's system says; written atomically
    Raises   LofiError when the disk is full
    """
    folder = Path(folder)
    page = _template().render(
        title=title,
        notes=list(notes),
        proofs=list(proofs),
        log=list(log),
        curve=loss_curve(read_json_lines(folder / "metrics.jsonl")),
        figures=figure_table(figures),
        tables={name: list(rows) for name, rows in (tables or {}).items() if rows},
        samples=[list(spans) for spans in samples or ()],
        settings=settings_of(folder / "recipe.yaml"),
        chosen=choices_of(_json(folder / "chosen.json")),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def figure_table(rows: Sequence[Row]) -> dict[str, Any]:
    """{"who": column heads, "lines": [(metric, n, [cell or ""])], "intervals": any?}, in order of appearance."""
    heads = list(dict.fromkeys(str(row["who"]) for row in rows))
    by_metric: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_metric.setdefault(str(row["metric"]), {})[str(row["who"])] = row
    lines = []
    for metric, cells in by_metric.items():
        counts = sorted({row["n"] for row in cells.values() if row.get("n") is not None})
        shown = [figure(cells[who]) if who in cells else "" for who in heads]
        lines.append((metric, ", ".join(map(str, counts)), shown))
    intervals = any(row.get("low") is not None for row in rows)
    return {"who": heads, "lines": lines, "intervals": intervals}


def figure(row: Row) -> str:
    """ "0.412 (0.398 to 0.427)", without the interval where there is none."""
    text = _number(row.get("value"))
    if row.get("low") is None or row.get("high") is None:
        return text
    return f"{text} ({_number(row['low'])} to {_number(row['high'])})"


def settings_of(path: Path) -> list[tuple[str, str, str]]:
    """(dotted key, value, origin) of a recipe whose lines read `  key: value  # origin`; [] without a file."""
    found, section = [], ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        text, _, origin = line.rpartition("  # ")
        key, _, value = (text or line).partition(":")
        if not text:
            section = f"{key.strip()}."
            continue
        found.append((f"{section if key.startswith(' ') else ''}{key.strip()}", value.strip(), origin))
    return found


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "none" if value is None else str(value)
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def choices_of(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, choice, reason) of chosen.json's "choices", whose "why" holds the reasons."""
    choices = dict(record.get("choices", {}))
    why = choices.pop("why", {})
    return [
        (key.replace("_", " "), str(value), why.get(key, "")) for key, value in choices.items() if value is not None
    ]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _template() -> Any:
    import jinja2

    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
