"""Figures of a study as words: names of metrics, numbers with as many digits as they deserve, lists of arms.

Knows numbers and names. Knows not where they come from. The verdict, the page and the plots say them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_LABELS = {
    "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum", "macro_f1": "macro F1", "micro_f1": "micro F1", "span_f1": "span F1",
}  # fmt: skip


def metric_label(metric: str) -> str:
    """`rougeL` -> "ROUGE-L"; a name that is not known, with its underscores as spaces."""
    return _LABELS.get(metric, metric.replace("_", " "))


def number(value: float | None) -> str:
    """A figure with four digits that count, "none" for none: 54.12, 0.4123, 1,234, 0.00012."""
    if value is None:
        return "none"
    if not math.isfinite(value):
        return "infinite" if value > 0 else "minus infinity" if value < 0 else "not a number"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.{3 - math.floor(math.log10(size))}f}"
    return f"{value:.4f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def count(value: float | None) -> str:
    """A whole number with commas, "none" for none."""
    return "none" if value is None else f"{value:,.0f}"


def short(value: float) -> str:
    """A number for an axis: 1.2k, 35M, 0.05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def signed(value: float) -> str:
    """A difference: +0.41, -1.20."""
    return ("-" if value < 0 else "+") + number(abs(value))


def percent(share: float) -> str:
    """0.0123 -> "1.2 %", 0.3 -> "30 %"."""
    return f"{100 * share:.2g} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"


def times(ratio: float) -> str:
    """A ratio as a factor: 1.03, 12, 1,300."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def chance(p: float) -> str:
    """A p value: "p = 0.03", "p < 0.001", never 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.0995 else f"p = {p:.2f}"


def between(low: float | None, high: float | None) -> str:
    """An interval: "51.2 to 56.0"; "no interval" where there is none."""
    return "no interval" if low is None or high is None else f"{number(low)} to {number(high)}"


def listing(names: Sequence[str], most: int = 4) -> str:
    """ "a, b and c", "a, b, c, d and 3 more"."""
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def plural(n: int, one: str, many: str | None = None) -> str:
    """ "1 run", "3 runs"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
