"""What a study says as tables: the cells of the page's main table and of its tests, and the lines of results.csv.

Knows statistics. Knows not HTML: a cell is text, a value to sort by, and marks. One cell a figure; nothing is rounded
in results.csv.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.study.record import BASE, FIGURES
from lofi.study.statistics import RATIOS, Arm, Contrast, Score, Spread, Statistics, sign
from lofi.study.wording import between, chance, count, metric_label, number, plural, signed, times

FULL_AND_BASE = ("full", "base")


@dataclass(frozen=True)
class Mark:
    """A significant difference: better or worse, than whom, with the figures for those who ask."""

    kind: str
    words: str
    title: str


@dataclass(frozen=True)
class Cell:
    """One cell: what is read, a second line, what is sorted by (None: last in either direction), and marks."""

    text: str
    below: str = ""
    sort: float | str | None = None
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column: its head, a sentence on what it is, whether its best value is the largest or smallest."""

    head: str
    about: str
    first: str = "ascending"
    cells: tuple[Cell, ...] = field(default=(), repr=False)


FIGURE_COLUMNS: tuple[tuple[str, str, str, str, Callable[[float | None], str]], ...] = (
    ("trainable", "trainable", "parameters that are trained", "ascending", count),
    ("adapter_mb", "adapter MB", "what is stored, in megabytes (10^6 bytes)", "ascending", number),
    ("peak_mb", "peak MB", "largest resident memory of the training process, in megabytes", "ascending", count),
    ("tokens_per_second", "tokens/s", "trained tokens a second (rows, where a row has one label)", "descending", count),
    ("latency_ratio", "latency", "time to answer with the adapter apart, times the base's", "ascending", number),
    ("latency_merged_ratio", "merged", "time to answer once merged, times the base's", "ascending", number),
    ("forgetting", "forgetting", "perplexity on general text, times the base's", "ascending", number),
)


def ordered(statistics: Statistics) -> list[Arm]:
    """The arms, best first in the first metric; those without a figure last."""
    metric = statistics.metrics[0] if statistics.metrics else ""

    def key(arm: Arm) -> float:
        score = arm.scores.get(metric)
        return -sign(metric) * score.value if score and not math.isnan(score.value) else math.inf

    return sorted(statistics.arms, key=key)


def columns(statistics: Statistics) -> list[Column]:
    """The main table; figures that no arm has are left out."""
    arms = ordered(statistics)
    found = [Column("arm", "what is compared", cells=tuple(Cell(arm.name, _runs(arm), arm.name) for arm in arms))]
    for metric in statistics.metrics:
        first = "descending" if sign(metric) > 0 else "ascending"
        about = f"mean over seeds with its 95 % interval; {'more' if sign(metric) > 0 else 'less'} is better"
        cells = tuple(_score_cell(arm, metric, statistics) for arm in arms)
        found.append(Column(metric_label(metric), about, first, cells))
    for key, head, about, first, show in FIGURE_COLUMNS:
        if any(arm.figure(key) is not None for arm in arms):
            shown = times if key in RATIOS else show
            found.append(Column(head, about, first, tuple(_figure_cell(arm, key, shown) for arm in arms)))
    return found


def _runs(arm: Arm) -> str:
    """ "3 seeds", "2 seeds, 1 failed"."""
    done = "" if arm.name == BASE or not arm.n_seeds else plural(arm.n_seeds, "seed")
    return ", ".join(part for part in (done, f"{arm.failed} failed" if arm.failed else "") if part)


def _score_cell(arm: Arm, metric: str, statistics: Statistics) -> Cell:
    score = arm.scores.get(metric)
    if score is None:
        return Cell("")
    below = "" if score.low is None else between(score.low, score.high)
    found = [(key, arm.contrast(key, metric)) for key in FULL_AND_BASE]
    marks = tuple(_mark(key, one, metric, statistics) for key, one in found if one is not None and one.significant)
    return Cell(number(score.value), below, score.value, marks)


def _mark(key: str, found: Contrast, metric: str, statistics: Statistics) -> Mark:
    better = sign(metric) * found.difference > 0
    title = f"{signed(found.difference)} against {found.against} ({between(found.low, found.high)}), {_both(found)}"
    return Mark("better" if better else "worse", f"{'▲' if better else '▼'} {key}", title)


def _both(found: Contrast) -> str:
    return f"{chance(found.p)}, corrected {chance(found.corrected)}"


def _figure_cell(arm: Arm, key: str, show: Callable[[float], str]) -> Cell:
    found = arm.figures.get(key)
    if found is None and arm.method == "full" and key == "latency_ratio":
        return Cell("as base", sort=1.0)
    if found is None:
        return Cell("cannot" if _unmergeable(arm, key) else "")
    below = f"{show(found.low)} to {show(found.high)}" if show(found.low) != show(found.high) else ""
    return Cell(show(found.mean), below, found.mean)


def _unmergeable(arm: Arm, key: str) -> bool:
    """An arm whose latency was measured apart but not merged has no merged form."""
    return (
        key == "latency_merged_ratio" and arm.figure("latency_ratio") is not None and arm.method not in (BASE, "full")
    )


def tests(statistics: Statistics) -> list[dict[str, str]]:
    """Every paired test as a row of words, the first metric first."""
    return [
        {
            "metric": metric_label(metric),
            "arm": arm.name,
            "against": found.against,
            "difference": signed(found.difference),
            "95 % interval": between(found.low, found.high),
            "p": chance(found.p).removeprefix("p = ").removeprefix("p "),
            "corrected": chance(found.corrected).removeprefix("p = ").removeprefix("p "),
        }
        for metric in statistics.metrics
        for key in FULL_AND_BASE
        for arm in ordered(statistics)
        if (found := arm.contrast(key, metric)) is not None
    ]


def result_rows(statistics: Statistics) -> list[dict[str, Any]]:
    """The figures as every verb's `--json` prints them: who, metric, value, low, high, n."""
    return [
        {"who": arm.name, "metric": metric, "value": one.value, "low": one.low, "high": one.high, "n": one.rows}
        for arm in statistics.arms
        for metric, one in arm.scores.items()
    ]


def as_csv(statistics: Statistics) -> str:
    """results.csv: a line an arm and metric; an arm without a figure has one line with its metric empty."""
    lines = list(_csv_rows(statistics))
    heads = list(dict.fromkeys(head for line in lines for head in line))
    written = io.StringIO()
    writer = csv.DictWriter(written, heads or ["who"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def _csv_rows(statistics: Statistics) -> Iterator[dict[str, Any]]:
    for arm in statistics.arms:
        scores: Sequence[tuple[str, Score | None]] = list(arm.scores.items()) or [("", None)]
        for metric, score in scores:
            yield (
                {"who": arm.name, "method": arm.method, "metric": metric, **_score_values(score)}
                | {"runs": arm.n_seeds, "failed": arm.failed}
                | {key: value for name in FULL_AND_BASE for key, value in _test_values(arm, name, metric).items()}
                | {key: _mean(arm.figures.get(key)) for key in (*FIGURES, *RATIOS)}
            )


def _score_values(score: Score | None) -> dict[str, Any]:
    names = {"value": "value", "low": "low", "high": "high", "n": "rows", "spread_of_seeds": "spread"}
    return {head: getattr(score, name, None) for head, name in names.items()}


def _test_values(arm: Arm, name: str, metric: str) -> dict[str, Any]:
    found = arm.contrast(name, metric)
    heads = {"difference": f"minus_{name}", "low": f"minus_{name}_low", "high": f"minus_{name}_high"}
    heads |= {"p": f"p_{name}", "corrected": f"p_{name}_corrected"}
    return {head: getattr(found, key, None) for key, head in heads.items()}


def _mean(found: Spread | None) -> float | None:
    return None if found is None else found.mean
