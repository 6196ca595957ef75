"""docs/results.md from the kept figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = """# Results

Every figure on this page is made by `make results` (one experiment: `make results ONLY=e2e`), which runs the commands
shown, on the models and data that `LOFI_SHARED` names. Intervals are 95 % bootstrap intervals over the test rows.
Minutes are wall-clock, with the threads named below each table; other work may have shared the machine's other cores.
The page is written by `python -m results`: do not edit it.
"""


def write_page(figures: Path, order: Sequence[str], page: Path) -> None:
    """Write the page from the figures that exist, in order."""
    kept = [json.loads((figures / f"{name}.json").read_text()) for name in order if (figures / f"{name}.json").exists()]
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join([HEAD, *(_section(entry) for entry in kept)]))


def _section(entry: dict[str, Any]) -> str:
    lines = [f"## {entry['title']}", "", entry["asked"], "", _row(entry["columns"])]
    lines += [_row(["---"] * len(entry["columns"])), *(_row(row) for row in entry["rows"]), ""]
    lines += [f"- {note}" for note in entry["notes"]] + ([""] if entry["notes"] else [])
    lines += ["```sh", *entry["commands"], "```", ""]
    lines += [f"*{entry['date']}, {entry['minutes']:.1f} minutes in all, on {entry['machine']}.*", ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
