"""What the runs of a study say together: per arm a figure with its interval over seeds and examples, and paired tests.

Two things make a figure uncertain, and both are in every interval and p here:
    examples  another test set: rows are drawn with replacement, the same draw for every run of the study, so that each
              comparison is paired (bootstrap of `lofi.evaluate`: a figure is a function of sums of counts over rows)
    seeds     another training run: the mean over S seeds moves by s/sqrt(S) times Student's t with S - 1 degrees of
              freedom, s the spread between the seeds' figures; two arms with the same seeds are compared seed by seed
Knows records. Knows not what to conclude (`verdict`) or how to show it (`page`). numpy only.
Rejected: drawing seeds with replacement, as larger hierarchical bootstraps do: of three seeds it gives at most the
smallest and the largest, which as a "95 %" interval holds in three cases of four (a test shows both). Rejected: runs
pooled as if their rows were independent (a seed's rows share its luck), and one spread for all arms (methods differ).
Known limits: with one seed an interval speaks of other examples only, not of other runs (`n_seeds` says so); with two,
Student's t has one degree of freedom and intervals are wide, as they should be.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lofi.evaluate.intervals import Array, quantiles, resamples, two_sided
from lofi.study.record import BASE, STATISTICS, Measured, RunRecord

LOWER_IS_BETTER = frozenset({"perplexity", "loss"})
HUNDREDS = frozenset({"bleu", "chrf"})
UNBOUNDED = {"perplexity": (1.0, math.inf), "loss": (0.0, math.inf)}
SIGNIFICANT = 0.05
"""A difference is called significant where its corrected p is below this."""
LEVEL = 0.95
RESAMPLES = 5000

RATIOS = {
    "forgetting": ("general_ppl", "general_ppl_base"),
    "latency_ratio": ("latency_ms", "latency_base_ms"),
    "latency_merged_ratio": ("latency_merged_ms", "latency_base_ms"),
}
"""Figures that are worked out run by run from two others: perplexity on general text and latency, against the base's.
Forgetting above 1 means that the run reads general text worse than the base does."""


@dataclass(frozen=True)
class Score:
    """An arm's figure in one metric: the mean over its seeds of the figure of each, with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    """None where one row and one seed, or a figure that is not finite, cannot say how sure they are."""
    rows: int
    seeds: int
    spread: float | None
    """Standard deviation between the seeds; None with one."""


@dataclass(frozen=True)
class Contrast:
    """An arm's figure minus that of `against`, its interval, its two-sided p and the p corrected for the many arms."""

    against: str
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    """Holm's (1979) over the arms tested in this metric against this one; what marks and words go by."""

    @property
    def significant(self) -> bool:
        return self.corrected < SIGNIFICANT


@dataclass(frozen=True)
class Spread:
    """A measured figure over an arm's runs: mean, smallest and largest."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Arm:
    """All runs that differ by nothing but their seed."""

    name: str
    method: str
    overrides: Mapping[str, Any]
    """The recipe keys that make the arm, the seed left out."""
    seeds: tuple[int | None, ...]
    """Of the runs that are done."""
    failed: int
    scores: Mapping[str, Score]
    figures: Mapping[str, Spread | None]
    """Every figure of the records and of RATIOS; None where no run has it."""
    contrasts: Mapping[str, Mapping[str, Contrast]] = field(default_factory=dict)
    """"base", "full" or "best" -> metric -> the test; what cannot be tested is left out."""

    @property
    def n_seeds(self) -> int:
        return len(self.seeds)

    def figure(self, name: str) -> float | None:
        """The mean of a figure, None where no run has it."""
        found = self.figures.get(name)
        return None if found is None else found.mean

    def slowdown(self) -> float | None:
        """Time to answer, times the base's, in the arm's fastest form; 1 for a fully tuned model, which has the base's
        own layers; None where it was not measured."""
        if self.method == "full":
            return 1.0
        both = [self.figure(key) for key in ("latency_ratio", "latency_merged_ratio")]
        return min((ratio for ratio in both if ratio is not None), default=None)

    def contrast(self, against: str, metric: str) -> Contrast | None:
        """The comparison with "base", "full" or "best"; None where there is none."""
        return self.contrasts.get(against, {}).get(metric)


@dataclass(frozen=True)
class Failure:
    """A run that failed, and its sentence."""

    run: str
    arm: str
    error: str


@dataclass(frozen=True)
class Statistics:
    """A study's arms in the order of its runs, the base first where it was measured, and who stands for what."""

    arms: tuple[Arm, ...]
    metrics: tuple[str, ...]
    """The first is the one that the verdict and the best and full arms are chosen by."""
    full: str | None
    """The arm of full fine-tuning that is best in the first metric."""
    best: str | None
    """The arm, the base aside, that is best in the first metric."""
    failures: tuple[Failure, ...]

    @property
    def base(self) -> Arm | None:
        return self.get(BASE)

    @property
    def trained(self) -> tuple[Arm, ...]:
        """The arms that were trained and have the first metric."""
        return tuple(arm for arm in self.arms if arm.name != BASE and self.metrics and self.metrics[0] in arm.scores)

    def get(self, name: str | None) -> Arm | None:
        """An arm by name, None if there is no such one."""
        return next((arm for arm in self.arms if arm.name == name), None)


def sign(metric: str) -> int:
    """1 where more is better, -1 where less is (perplexity, loss)."""
    return -1 if metric in LOWER_IS_BETTER else 1


def bounds(metric: str) -> tuple[float, float]:
    """The values that a metric can take; any number for a metric that is not lofi's."""
    from lofi.evaluate.metrics import METRICS

    if metric in HUNDREDS:
        return 0.0, 100.0
    return UNBOUNDED.get(metric, (0.0, 1.0) if metric in METRICS else (-math.inf, math.inf))


def summarise(records: Sequence[RunRecord], *, seed: int = 0, n: int = RESAMPLES) -> Statistics:
    """The arms of a study with their figures, intervals and tests.

    n  resamples; no p is below 2 / (n + 1)
    A run that was measured on other rows than most counts as failed, for nothing could be paired with it.
    Exact   a value is the mean over seeds of the statistic of all rows; all draws are the same for the same seed, and
            an arm's interval does not depend on which other arms there are
    """
    records = _comparable(records)
    groups: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: -1 if record.seed is None else record.seed):
        groups.setdefault(record.arm, []).append(record)
    groups = {record.arm: groups[record.arm] for record in records}  # the study's order of arms, each by seed
    metrics = tuple(dict.fromkeys(metric for record in records if record.done for metric in record.measures))
    draws = {metric: _Draws(metric, groups, n, seed) for metric in metrics}
    arms = [_arm(name, runs, draws) for name, runs in groups.items()]
    arms.sort(key=lambda arm: arm.name != BASE)
    best = _best(arms, metrics)
    full = _best([arm for arm in arms if arm.method == "full"], metrics)
    references = {"base": BASE if BASE in groups else None, "full": full, "best": best}
    tests = {key: _contrasts(arms, name, draws) for key, name in references.items() if name is not None}
    arms = [replace(arm, contrasts={key: found.get(arm.name, {}) for key, found in tests.items()}) for arm in arms]
    return Statistics(tuple(arms), metrics, full, best, tuple(_failures(records)))


class _Draws:
    """One metric: every arm's figure per seed, on all rows (S,) and on each resample of them (n, S)."""

    def __init__(self, metric: str, groups: Mapping[str, Sequence[RunRecord]], n: int, seed: int) -> None:
        runs = [run for group in groups.values() for run in group if run.done and metric in run.measures]
        self.metric, self.n, self.seed = metric, n, seed
        self.rows = runs[0].measures[metric].n
        self.seeds: dict[str, list[int | None]] = {}
        self.on_all: dict[str, Array] = {}
        self.on_drawn: dict[str, Array] = {}
        on_all, on_drawn = self._worked_out([run.measures[metric].rows for run in runs], runs[0])
        for arm in dict.fromkeys(run.arm for run in runs):
            places = [place for place, run in enumerate(runs) if run.arm == arm]
            self.seeds[arm] = [runs[place].seed for place in places]
            self.on_all[arm], self.on_drawn[arm] = on_all[places], on_drawn[:, places]

    def _worked_out(self, tables: Sequence[Array], like: RunRecord) -> tuple[Array, Array]:
        """The figures of all runs on all rows (S,) and on each resample (n, S), as one product of matrices."""
        statistic = STATISTICS[like.measures[self.metric].statistic]
        counts = np.concatenate(tables, axis=1)  # (N, S K)
        shape = (len(tables), tables[0].shape[1])  # (S, K)
        weighed = (
            statistic((weights @ counts).reshape(-1, *shape)) for weights in resamples(self.rows, self.n, self.seed)
        )
        return statistic(counts.sum(0).reshape(shape)), np.concatenate(list(weighed))

    def score(self, arm: str) -> Score:
        seeds = self.on_all[arm]
        value, finite = float(seeds.mean()), bool(np.isfinite(seeds).all())
        spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 and finite else None
        drawn = self.on_drawn[arm].mean(1) + self._luck(arm, seeds)
        if not np.isfinite(drawn).all() or (self.rows == 1 and len(seeds) == 1):
            return Score(value, None, None, self.rows, len(seeds), spread)
        low, high = np.clip(quantiles(drawn, LEVEL), *bounds(self.metric))
        return Score(value, float(low), float(high), self.rows, len(seeds), spread)

    def contrast(self, ours: str, theirs: str) -> Contrast | None:
        """One arm minus another, p not yet corrected; None where nothing varies or a figure is not finite."""
        if ours == theirs or not {ours, theirs} <= set(self.on_all):
            return None
        a, b = self.on_all[ours], self.on_all[theirs]
        same = self.seeds[ours] == self.seeds[theirs] and len(a) > 1
        with np.errstate(invalid="ignore"):  # infinity - infinity: no test
            luck = self._luck(f"{ours} - {theirs}", a - b) if same else self._luck(f"{ours} - {theirs}", a, b)
            drawn = self.on_drawn[ours].mean(1) - self.on_drawn[theirs].mean(1) + luck
        if not np.isfinite(drawn).all() or (self.rows == 1 and max(len(a), len(b)) == 1):
            return None
        low, high = quantiles(drawn, LEVEL)
        p = two_sided(drawn)
        return Contrast(theirs, float(a.mean() - b.mean()), low, high, p, p)

    def _luck(self, name: str, *groups: Array) -> Array | float:
        """What other seeds would have moved: (n,) draws of s/sqrt(S) t, for two groups after Welch (1947)."""
        able = [group for group in groups if len(group) > 1 and np.isfinite(group).all()]
        parts = [(float(np.var(group, ddof=1)) / len(group), len(group) - 1) for group in able]
        variance = sum(part for part, _ in parts)
        if variance == 0:
            return 0.0
        freedom = variance**2 / sum(part**2 / free for part, free in parts)
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return math.sqrt(variance) * rng.standard_t(freedom, self.n)


def _comparable(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records, those that answered other rows than most turned into failed ones: no comparison would be paired."""
    found = list(records)
    for metric in dict.fromkeys(metric for record in records if record.done for metric in record.measures):
        kinds = {i: _kind(one.measures[metric]) for i, one in enumerate(found) if one.done and metric in one.measures}
        usual = Counter(kinds.values()).most_common(1)[0][0] if kinds else None
        for place, kind in kinds.items():
            if kind != usual:
                found[place] = replace(found[place], status="failed", error=_other_rows(metric, kind, usual))
    return found


Kind = tuple[tuple[int, ...], str]


def _kind(measured: Measured) -> Kind:
    return measured.rows.shape, measured.statistic


def _other_rows(metric: str, kind: Kind, usual: Kind | None) -> str:
    (rows, *_), statistic = kind
    (others, *_), theirs = usual or kind
    return (
        f"{metric} was measured on {rows} rows as {statistic}, in most runs on {others} as {theirs}: a study compares "
        "runs on the same rows, so remove this run's folder and run the study again"
    )


def _arm(name: str, runs: Sequence[RunRecord], draws: Mapping[str, _Draws]) -> Arm:
    done = [run for run in runs if run.done]
    names = dict.fromkeys([key for run in done for key in run.figures] + list(RATIOS))
    return Arm(
        name=name,
        method=runs[0].method,
        overrides={key: value for key, value in runs[0].overrides.items() if key not in ("seed", "train.seed")},
        seeds=tuple(run.seed for run in done),
        failed=len(runs) - len(done),
        scores={metric: one.score(name) for metric, one in draws.items() if name in one.on_all},
        figures={key: _spread(_figure(run, key) for run in done) for key in names},
    )


def _figure(run: RunRecord, name: str) -> float | None:
    if name not in RATIOS:
        return run.figures.get(name)
    if run.method == "full" and name.startswith("latency"):
        return None  # it was timed in another process than the base: the ratio would be noise about 1
    over, under = (run.figures.get(key) for key in RATIOS[name])
    return over / under if over is not None and under else None


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return Spread(sum(known) / len(known), min(known), max(known)) if known else None


def _best(arms: Sequence[Arm], metrics: Sequence[str]) -> str | None:
    """The trained arm that is best in the first metric, the first of several; None where none is finite."""
    able = [arm for arm in arms if arm.name != BASE and metrics and metrics[0] in arm.scores]
    able = [arm for arm in able if math.isfinite(arm.scores[metrics[0]].value)]
    return max(able, key=lambda arm: sign(metrics[0]) * arm.scores[metrics[0]].value).name if able else None


def _contrasts(arms: Sequence[Arm], reference: str, draws: Mapping[str, _Draws]) -> dict[str, dict[str, Contrast]]:
    """arm -> metric -> its test against the reference; the base is tested against no one."""
    found: dict[str, dict[str, Contrast]] = {}
    for metric, one in draws.items():
        tested = {arm.name: one.contrast(arm.name, reference) for arm in arms if arm.name != BASE}
        known = {name: test for name, test in tested.items() if test is not None}
        corrected = holm([test.p for test in known.values()])
        for (name, test), p in zip(known.items(), corrected, strict=True):
            found.setdefault(name, {})[metric] = replace(test, corrected=p)
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """Corrected p of several tests: the chance of one or more false ones among those below alpha is at most alpha.

    p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), p_(1) the smallest of m.  Holm, "A simple sequentially
    rejective multiple test procedure", 1979
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def _failures(records: Iterable[RunRecord]) -> Iterable[Failure]:
    for record in records:
        if not record.done:
            yield Failure(record.name, record.arm, record.error or "it gave no reason")
