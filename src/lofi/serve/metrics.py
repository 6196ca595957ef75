"""Counts and latencies of one server: for Prometheus, for the page, and nothing global.

Everything is counted in the event loop's thread, in plain numbers; Prometheus' families are made when it asks, so a
token costs an addition and a bisection and never a lock. Knows no HTTP. Rejected: prometheus_client's own Counter and
Histogram objects (a lock and a label look-up a token, and adapters that left would stay as labels for ever).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from lofi.serve.delivery import Choice
from lofi.serve.request import Stats

BASE, GONE = "base", "unloaded"
FIRST_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LAST_REQUESTS, LAST_SAMPLES = 50, 1024
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Spread:
    """How a duration is distributed: cumulative buckets since the start, and the latest samples for percentiles."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.latest: deque[float] = deque(maxlen=LAST_SAMPLES)

    def add(self, seconds: float, times: int = 1) -> None:
        """Count one duration, `times` over."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times
        self.latest.append(seconds)

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus' cumulative buckets."""
        found, running = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            found.append((bound, float(running)))
        return found

    def percentiles(self) -> dict[str, float | None]:
        """{"p50", "p95", "p99"} of the latest samples in milliseconds (nearest rank); None before the first."""
        ordered = sorted(self.latest)
        ranks = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        if not ordered:
            return dict.fromkeys(ranks)
        last = len(ordered) - 1
        return {name: round(1000 * ordered[min(last, int(share * len(ordered)))], 3) for name, share in ranks.items()}


class Meters:
    """What happened so far."""

    def __init__(self) -> None:
        self.finished: Counter[tuple[str, str]] = Counter()
        self.prompt_tokens: Counter[str] = Counter()
        self.cached_tokens: Counter[str] = Counter()
        self.tokens_made: Counter[str] = Counter()
        self.responses: Counter[tuple[str, int]] = Counter()
        self.first, self.token = Spread(FIRST_BOUNDS), Spread(TOKEN_BOUNDS)
        self.requests: deque[dict[str, Any]] = deque(maxlen=LAST_REQUESTS)

    def tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """`count` tokens came `seconds` after the last ones, or after the request."""
        if first:
            self.first.add(seconds)
        else:
            self.token.add(seconds / count, count)

    def ended(self, choice: Choice) -> None:
        """An answer ended, however it did."""
        who = choice.asked.adapter or BASE
        self.finished[who, str(choice.finish)] += 1
        self.prompt_tokens[who] += len(choice.asked.prompt)
        self.cached_tokens[who] += choice.cached
        self.tokens_made[who] += len(choice.tokens)
        self.requests.append(
            {
                "adapter": choice.asked.adapter,
                "prompt_tokens": len(choice.asked.prompt),
                "tokens": len(choice.tokens),
                "seconds": round(time.perf_counter() - choice.started, 6),
                "first_token_ms": round(1000 * (choice.first - choice.started), 3) if choice.first else None,
                "finish": choice.finish,
            }
        )

    def responded(self, route: str, status: int) -> None:
        """An HTTP answer went out."""
        self.responses[route, status] += 1

    def requests_of(self, who: str) -> int:
        """How many answers of an adapter (or BASE) ended."""
        return sum(count for (name, _), count in self.finished.items() if name == who)


class Exposition:
    """A registry of its own that turns the meters and the engine's state into Prometheus' text."""

    def __init__(self, meters: Meters, stats: Callable[[], Stats], states: Callable[[], Mapping[str, str]]) -> None:
        self.meters, self.stats, self.states = meters, stats, states
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """The body of GET /metrics."""
        return generate_latest(self._registry)

    def describe(self) -> list[Any]:
        """Nothing in advance: the registry need not ask the engine to know the names."""
        return []

    def collect(self) -> Iterator[Any]:
        """Every family, now; adapters that were unloaded are counted together."""
        states = self.states()
        yield from self._counted(states)
        yield from _histograms(self.meters)
        yield from _engine(self.stats())
        adapters = GaugeMetricFamily("lofi_adapters", "Adapters by where they are held.", labels=["state"])
        held = Counter(states.values())
        for state in ("device", "host", "disk"):
            adapters.add_metric([state], held[state])
        yield adapters

    def _counted(self, states: Mapping[str, str]) -> Iterator[Any]:
        meters = self.meters
        requests = CounterMetricFamily("lofi_requests", "Answers by adapter and end.", labels=["adapter", "finish"])
        for (who, finish), count in _folded(meters.finished, states).items():
            requests.add_metric([who, finish], count)
        yield requests
        for name, told, counts in (
            ("lofi_prompt_tokens", "Prompt tokens by adapter.", meters.prompt_tokens),
            ("lofi_cached_prompt_tokens", "Prompt tokens taken from an earlier request.", meters.cached_tokens),
            ("lofi_generated_tokens", "Generated tokens by adapter.", meters.tokens_made),
        ):
            family = CounterMetricFamily(name, told, labels=["adapter"])
            for (who,), count in _folded(Counter({(who,): n for who, n in counts.items()}), states).items():
                family.add_metric([who], count)
            yield family
        responses = CounterMetricFamily("lofi_http_responses", "HTTP answers.", labels=["route", "status"])
        for (route, status), count in meters.responses.items():
            responses.add_metric([route, str(status)], count)
        yield responses


def _folded(counts: Mapping[Any, int], states: Mapping[str, str]) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for (who, *rest), count in counts.items():
        found[(who if who == BASE or who in states else GONE, *rest)] += count
    return found


def _histograms(meters: Meters) -> Iterator[Any]:
    for name, told, spread in (
        ("lofi_first_token_seconds", "From the request to its first token.", meters.first),
        ("lofi_token_seconds", "Between a token and the next of the same answer.", meters.token),
    ):
        yield HistogramMetricFamily(name, told, buckets=spread.buckets(), sum_value=spread.total)


def _engine(stats: Stats) -> Iterator[Any]:
    for name, told, value in (
        ("lofi_running_requests", "Requests in the batch.", stats.running),
        ("lofi_waiting_requests", "Requests in the queue.", stats.waiting),
        ("lofi_batch_rows", "The most requests that run at once.", stats.rows),
        ("lofi_queue_size", "The most requests that wait.", stats.queue),
        ("lofi_cache_tokens", "Positions of keys and values in use.", stats.cache_tokens),
        ("lofi_cache_capacity_tokens", "Positions of keys and values there are.", stats.cache_capacity),
        ("lofi_tokens_per_second", "Generated tokens over the last ten seconds.", stats.tokens_per_second),
        ("lofi_draining", "1 while the server stops and takes nothing new.", int(stats.draining)),
    ):
        yield GaugeMetricFamily(name, told, value=value)
    yield CounterMetricFamily("lofi_engine_steps", "Forward passes of the engine.", value=stats.steps)
