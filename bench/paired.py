"""Callables timed in turn in one process: ratios of their times, with intervals."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Timing:
    """Seconds of every side, round by round."""

    seconds: dict[str, list[float]]

    def ratio(self, a: str, b: str) -> Ratio:
        """How a's time relates to b's: each round is compared with itself."""
        ratios = [x / y for x, y in zip(self.seconds[a], self.seconds[b], strict=True)]
        generator = random.Random(0)
        medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
        return Ratio(statistics.median(ratios), medians[50], medians[1949], self.ms(a), self.ms(b))

    def ms(self, side: str) -> float:
        """The median time of one side in milliseconds."""
        return statistics.median(self.seconds[side]) * 1e3


_PAUSE = 0.01  # seconds: two libraries with thread pools of their own, and the pool that was just used still spins


def interleaved(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 3, calls: int = 1, settle: int = 0
) -> Timing:
    """Time every side once a round, after warming all of them up; the order turns from round to round.

    A turn is a pause, in which the other sides' idle threads stop spinning, `settle` calls that are not timed, and
    `calls` that are, of which the mean counts: calls of less than some milliseconds need several.
    """
    for _ in range(warm_up):
        for call in sides.values():
            call()
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(_PAUSE)
            for _ in range(settle):
                sides[name]()
            started = time.perf_counter()
            for _ in range(calls):
                sides[name]()
            seconds[name].append((time.perf_counter() - started) / calls)
    return Timing(seconds)


def paired(a: Callable[[], object], b: Callable[[], object], *, rounds: int = 60, warm_up: int = 5) -> Ratio:
    """Two sides in turn: the ratio a / b."""
    return interleaved({"a": a, "b": b}, rounds=rounds, warm_up=warm_up).ratio("a", "b")
