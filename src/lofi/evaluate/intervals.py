"""How sure a figure is: bootstrap intervals, and a paired test of one model against another on the same rows.

Knows arrays. Every figure here is a function of sums over rows, `statistic(rows.sum(0))`: a mean, a ratio (perplexity,
syllable accuracy) or a corpus score (BLEU, F1). A resample therefore is one weight per row, and all resamples are one
matrix product: 1,000 resamples of 10,000 rows take well under a second whatever the metric.
Rejected: scoring resampled texts again (hours for BLEU), normal intervals (wrong near 0 and 1), BCa (needs a jackknife,
which moved nothing at the sizes people test with). Known limit: where every row has the same value, as an accuracy of
1.0, the bootstrap sees no spread and its interval is that one point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lofi.errors import RequestError

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]

_BLOCK = 1 << 22  # weights held at once: 32 MiB


class Interval(NamedTuple):
    """A figure with its interval; `low` and `high` are None where one row cannot say how sure it is."""

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """A difference of two figures over the same rows, its interval and its two-sided p-value."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


def mean(sums: Array) -> Array:
    """The statistic of rows [value, 1]: their mean."""
    return ratio(sums)


def ratio(sums: Array) -> Array:
    """The statistic of rows [numerator, denominator]: sum over sum, 0 where nothing was counted."""
    counted = sums[..., 1]
    return np.divide(sums[..., 0], counted, out=np.zeros_like(counted), where=counted > 0)


def exp_ratio(sums: Array) -> Array:
    """The statistic of rows [loss in nats, tokens]: perplexity, exp(sum of losses / sum of tokens)."""
    with np.errstate(over="ignore"):  # a loss of more than 709 nats a token is an honest infinity
        return np.exp(ratio(sums))


def bootstrap(
    rows: ArrayLike, statistic: Statistic = mean, *, seed: int = 0, n: int = 1000, level: float = 0.95
) -> Interval:
    """A figure and its percentile bootstrap interval over rows.

    Rows are drawn with replacement n times; low and high are the (1 -+ level)/2 quantiles of the statistic.
    Efron and Tibshirani, "An introduction to the bootstrap", 1993, sec. 13.3.
    Shapes  rows (N,) for a mean, or (N, K) of additive counts; statistic (..., K) sums -> (...)
    Raises  RequestError without rows
    Exact   the value is the statistic of all rows; the interval is the same for the same seed
    """
    table = _table(rows)
    value = float(statistic(table.sum(0)))
    if len(table) == 1:
        return Interval(value, None, None)
    drawn = np.concatenate([statistic(weights @ table) for weights in resamples(len(table), n, seed)])
    low, high = quantiles(drawn, level)
    return Interval(value, low, high)


def paired_test(
    a: ArrayLike, b: ArrayLike, statistic: Statistic = mean, *, seed: int = 0, n: int = 1000, level: float = 0.95
) -> Difference:
    """Is model a's figure different from model b's on the same rows: statistic(a) - statistic(b), interval and p.

    Paired bootstrap: each resample takes the same rows of both (Koehn, "Statistical significance tests for machine
    translation evaluation", 2004). p = 2 (1 + the rarer sign's count, zeros with both) / (n + 1), at most 1: it is
    below 1 - level about where the interval leaves out 0; the smallest it can be is 2 / (n + 1).
    Shapes  as `bootstrap`; row i of a and of b belong to the same example
    Raises  RequestError without rows, or where a and b have not the same shape
    """
    ours, theirs = _table(a), _table(b)
    if ours.shape != theirs.shape:
        raise RequestError(
            f"a paired test needs the same rows of both models, but was given {len(ours)} and {len(theirs)}: "
            "evaluate both on the same file."
        )
    difference = float(statistic(ours.sum(0)) - statistic(theirs.sum(0)))
    if len(ours) == 1:
        return Difference(difference, None, None, None)
    drawn = np.concatenate(
        [statistic(weights @ ours) - statistic(weights @ theirs) for weights in resamples(len(ours), n, seed)]
    )
    return Difference(difference, *quantiles(drawn, level), two_sided(drawn))


def _table(rows: ArrayLike) -> Array:
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim == 1:
        table = np.stack([table, np.ones_like(table)], axis=1)  # (N, 2)
    if len(table) == 0:
        raise RequestError("there are no rows to make a figure of: give at least one.")
    return table


def resamples(rows: int, n: int, seed: int) -> Iterator[Array]:
    """How often each row is drawn (n, N), in blocks of resamples; the draws do not depend on the block's size."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // rows)
    for start in range(0, n, block):
        size = min(block, n - start)
        drawn = rng.integers(0, rows, (size, rows)) + np.arange(size)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)


def two_sided(drawn: Array) -> float:
    """The p of resampled differences: 2 (1 + the rarer sign's count, zeros with both) / (n + 1), at most 1."""
    rarer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (1 + rarer) / (len(drawn) + 1))


def quantiles(drawn: Array, level: float) -> tuple[float, float]:
    """The (1 -+ level)/2 quantiles of resampled figures."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
