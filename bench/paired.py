"""Two callables timed in turn: the ratio of their times, with an interval."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Median of the per-round ratios a / b, its 95 % bootstrap interval, and both medians in milliseconds."""

    value: float
    low: float
    high: float
    a_ms: float
    b_ms: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired(a: Callable[[], object], b: Callable[[], object], *, rounds: int = 60, warm_up: int = 5) -> Ratio:
    """Time a and b in turn, in an order that alternates, and compare each round with itself."""
    for _ in range(warm_up):
        a(), b()
    times_a, times_b = [], []
    for turn in range(rounds):
        first, second = ((a, times_a), (b, times_b)) if turn % 2 == 0 else ((b, times_b), (a, times_a))
        for call, times in (first, second):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    ratios = [x / y for x, y in zip(times_a, times_b, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=rounds)) for _ in range(2000))
    return Ratio(
        statistics.median(ratios),
        medians[50],
        medians[1949],
        statistics.median(times_a) * 1e3,
        statistics.median(times_b) * 1e3,
    )
