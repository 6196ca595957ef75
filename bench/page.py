"""docs/performance.md from the kept figures: one table a claim, what is not measured named as missing."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

HEAD = """# Performance

Every figure on this page is made by `make bench` (one claim: `make bench ONLY=nf4_linear`) on the machine named below
its table. Ratios are of sides measured in turn in one process, after all were warmed up, with the same threads, dtype
and tokens: the median of the per-round ratios with a 95 % bootstrap interval over the rounds. "Peer" is the same figure
of the other library, measured in the same run with the settings that are best for it. A goal that was not reached says
so. Weights are random: speed and memory do not depend on what they say. Absolute times hold for that machine only.
The page is written by `python -m bench`: do not edit it.
"""


def kept_file(claim: str) -> Path:
    """Where a claim's last figures are kept."""
    return HERE / "results" / f"{claim}.json"


def write_page(claims: Sequence[str], page: Path) -> None:
    """Write the page from the figures that exist, in order, and name the claims that have none."""
    there = [(name, json.loads(kept_file(name).read_text())) for name in claims if kept_file(name).exists()]
    missing = [name for name in claims if not kept_file(name).exists()]
    parts = [HEAD, summary([entry for _, entry in there]), *(section(name, entry) for name, entry in there)]
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(parts + _missing(missing)))


def summary(entries: list[dict[str, Any]]) -> str:
    """How many goals were reached, and those that were not."""
    goals = [row for entry in entries for row in entry["rows"] if row["goal"]]
    failed = [row for row in goals if not row["reached"]]
    lines = [f"Goals reached: {len(goals) - len(failed)} of the {len(goals)} measured."]
    if failed:
        lines += ["", "Not reached:", ""] + [f"- {row['what']}: {row['ours']}, goal {row['goal']}" for row in failed]
    return "\n".join([*lines, ""])


def section(name: str, entry: dict[str, Any]) -> str:
    """A claim's title, what it measures, its table, its command, and where and when it was measured."""
    title, told = asked(name)
    lines = [f"## {title}", "", *([told, ""] if told else [])]
    lines += [cells(["what", "lofi", "peer", "goal", "reached", "detail"]), cells(["---"] * 6)]
    lines += [cells(_row(row)) for row in entry["rows"]]
    lines += ["", "```sh", f"make bench ONLY={name}", "```", ""]
    return "\n".join([*lines, f"*{entry['date']}, {entry['seconds']:.0f} s, on {entry['machine']}.*", ""])


def _row(row: dict[str, Any]) -> list[str]:
    reached = "" if row["reached"] is None else "yes" if row["reached"] else "**no**"
    return [row["what"], row["ours"], row["peer"] or "", row["goal"] or "", reached, row["detail"]]


def _missing(names: list[str]) -> list[str]:
    if not names:
        return []
    lines = [f"- {asked(name)[0].rstrip('.')} (`make bench ONLY={name}`)" for name in names]
    return ["## Not measured yet", "", *lines, ""]


def asked(claim: str) -> tuple[str, str]:
    """A claim's title and what it measures: the first sentence of its docstring, and the rest."""
    text = ast.get_docstring(ast.parse((HERE / f"{claim}.py").read_text(encoding="utf-8"))) or claim
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()).rstrip("."), "\n".join(line.rstrip() for line in rest.splitlines())


def cells(texts: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"
