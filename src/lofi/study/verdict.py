"""What a study recommends, as one paragraph in plain words: which arm to take, why, and what it cannot say.

The rule. Taken is the cheapest arm whose measured figure in the first metric lies within a margin (2 %) of the best
arm's, and which is better than the base with p < 0.05. Cheapest: fewest trainable parameters; among equals the faster
at inference (merged, where it can be), then the faster in training, then the one with fewer settings. A cheaper arm
beyond the margin that the tests cannot tell from the best is named as undecided, not taken: few rows or seeds would
otherwise make everything "not significantly worse" and the cheapest arm always right.
Knows statistics and nothing else: the same statistics give the same words. Rejected: a score that weighs quality
against cost (its weights would be ours, not the reader's).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lofi.study.statistics import SIGNIFICANT, Arm, Contrast, Statistics, sign
from lofi.study.wording import between, chance, count, listing, metric_label, number, percent, plural, signed, times

MARGIN = 0.02
"""How far from the best figure, as a share of it, an arm may be and still be taken for being cheaper."""

_NOTHING = "No trained arm gave a figure, so there is nothing to recommend."


@dataclass(frozen=True)
class Verdict:
    """The arm to take (None: none of them) and the sentences that say why."""

    take: str | None
    sentences: tuple[str, ...]

    @property
    def words(self) -> str:
        """The paragraph."""
        return " ".join(self.sentences)

    @property
    def head(self) -> str:
        """How the paragraph begins: "Take lora r=4"; its first sentence up to a colon where nothing is taken."""
        taken = f"Take {self.take}"
        return taken if self.sentences[0].startswith(taken) else self.sentences[0].partition(":")[0]


def verdict(statistics: Statistics, *, margin: float = MARGIN) -> Verdict:
    """What the statistics recommend.

    margin  share of the best figure that an arm may lack; 0.02 is two hundredths of it
    """
    best = statistics.get(statistics.best)
    if best is None:
        return Verdict(None, (_NOTHING, *_failures(statistics)))
    study = _Study(statistics, best, margin)
    taken = study.taken()
    said = [*(study.why(taken) if taken else study.why_none()), *(study.beside(taken) if taken else ())]
    return Verdict(taken.name if taken else None, (*said, study.basis(), *_failures(statistics)))


class _Study:
    """The statistics as seen from the first metric and its best arm."""

    def __init__(self, statistics: Statistics, best: Arm, margin: float) -> None:
        self.all, self.best, self.margin = statistics, best, margin
        self.metric = statistics.metrics[0]
        self.label = metric_label(self.metric)
        self.arms = [arm for arm in statistics.trained if math.isfinite(arm.scores[self.metric].value)]

    def taken(self) -> Arm | None:
        """The cheapest arm within the margin that is better than the base."""
        able = [arm for arm in self.arms if self.lacks(arm) <= self.margin and self.beats_base(arm)]
        return min(able, key=cost) if able else None

    def lacks(self, arm: Arm, metric: str | None = None, best: Arm | None = None) -> float:
        """How much worse than the best arm, as a share of the best figure; never below 0."""
        metric = metric or self.metric
        top, ours = (one.scores[metric].value for one in (best or self.best, arm))
        behind = max(0.0, sign(metric) * (top - ours))
        return behind / abs(top) if top else math.inf * behind if behind else 0.0

    def beats_base(self, arm: Arm) -> bool:
        """Better than the base, where the base was measured, at an uncorrected p (the paragraph says both)."""
        base, found = self.all.base, arm.contrast("base", self.metric)
        if base is None or self.metric not in base.scores:
            return True
        return found is not None and found.p < SIGNIFICANT and sign(self.metric) * found.difference > 0

    def why(self, taken: Arm) -> Iterator[str]:
        others = len(self.arms) > 1
        if not others:
            yield f"Only {taken.name} was trained, so there is nothing to choose from: {self.reached(taken)}."
        elif taken is self.best:
            rest = self.nearest_cheaper(taken) or "it is also the cheapest"
            yield f"Take {taken.name}: {self.reached(taken)}, the best of {len(self.arms)} arms, and {rest}."
        else:
            yield f"Take {taken.name}: {self.reached(taken)}, {self.distance(taken)}."
        yield from self.over_base(taken)

    def cheaper(self, taken: Arm) -> list[Arm]:
        """The arms that cost less, the best of them first."""
        return sorted((arm for arm in self.arms if cost(arm) < cost(taken)), key=self.lacks)

    def nearest_cheaper(self, taken: Arm) -> str:
        """What the cheaper arms lack; "" where there are none."""
        cheaper = self.cheaper(taken)
        if not cheaper:
            return ""
        nearest = cheaper[0]
        if self.lacks(nearest) <= self.margin:
            return f"no cheaper arm within {percent(self.margin)} of it is shown to beat the base"
        lack = percent(self.lacks(nearest))
        return f"no cheaper arm comes within {percent(self.margin)} of it (the nearest, {nearest.name}, lacks {lack})"

    def reached(self, arm: Arm) -> str:
        score = arm.scores[self.metric]
        size = f"with {count(arm.figure('trainable'))} trainable parameters " if arm.figure("trainable") else ""
        reached = f"{self.label} {number(score.value)} (95 % interval {between(score.low, score.high)})"
        return f"{size}it reaches {reached}"

    def distance(self, arm: Arm) -> str:
        """Where the taken arm stands beside the best one, and whether the margin is proved."""
        best = f"{self.best.name} ({number(self.best.scores[self.metric].value)})"
        found = arm.contrast("best", self.metric)
        text = f"{percent(self.lacks(arm))} short of the best, {best}, and the cheapest within {percent(self.margin)}"
        if found is None:
            return text
        worst = -min(sign(self.metric) * found.low, sign(self.metric) * found.high)
        allowed = self.margin * abs(self.best.scores[self.metric].value)
        ruled = "is ruled out" if worst <= allowed else "is not ruled out"
        return f"{text} (difference {_tested(found)}; a loss beyond {percent(self.margin)} {ruled})"

    def over_base(self, taken: Arm) -> Iterator[str]:
        found, base = taken.contrast("base", self.metric), self.all.base
        if found is None or base is None:
            yield "The base model was not measured, so nothing is said about the gain over it."
            return
        few = "" if found.significant else f", which correction for {len(self.arms)} arms leaves open"
        was = number(base.scores[self.metric].value)
        yield f"The base has {was}: a difference of {_tested(found)}{few}."

    def why_none(self) -> Iterator[str]:
        base, found = self.all.base, self.best.contrast("base", self.metric)
        ours = f"{self.best.name} ({number(self.best.scores[self.metric].value)})"
        was = number(base.scores[self.metric].value) if base else "none"
        if found is not None and sign(self.metric) * found.difference <= 0:
            yield (
                f"Keep the base: nothing that was trained is better in {self.label} than its {was}; the best, {ours}, "
                f"differs by {_tested(found)}, so look at the learning rates and the data before anything else."
            )
        else:
            told = _tested(found) if found else "a difference that one row and one seed cannot test"
            yield (
                f"Take none of them yet: no arm within {percent(self.margin)} of the best is shown to be better in "
                f"{self.label} than the base ({was}); the best, {ours}, differs by {told}."
            )

    def beside(self, taken: Arm) -> Iterator[str]:
        """Everything about the taken arm that is not its figure."""
        yield from self.undecided(taken)
        yield from self.against_full(taken)
        yield from self.inference(taken)
        yield from self.forgetting(taken)
        yield from self.elsewhere(taken)

    def undecided(self, taken: Arm) -> Iterator[str]:
        """What the tests cannot tell from the best arm."""
        alike = [arm for arm in self.arms if arm not in (taken, self.best) and _open(arm.contrast("best", self.metric))]
        cheaper = [arm.name for arm in alike if cost(arm) < cost(taken)]
        others = [arm.name for arm in alike if cost(arm) >= cost(taken)]
        if cheaper:
            yield (
                f"Cheaper still and not told apart from the best, though more than {percent(self.margin)} short as "
                f"measured: {listing(cheaper)}; more rows or seeds would decide."
            )
        if others:
            yield f"Not told apart from the best either, but no cheaper: {listing(others)}."

    def against_full(self, taken: Arm) -> Iterator[str]:
        full = self.all.get(self.all.full)
        if full is None:
            yield "Full fine-tuning is not part of this study or gave no figure, so what it would gain is not known."
        elif full is taken:
            cheaper = self.cheaper(taken)
            costs = listing(list(_costs(full, cheaper[0]))) if cheaper else ""
            if costs:
                yield f"Beside {cheaper[0].name}, the nearest cheaper arm, it costs {costs}."
        else:
            found = taken.contrast("full", self.metric)
            costs = listing(list(_costs(full, taken)))
            yield f"Full fine-tuning{_named(full)} {self.gain(found)}" + (f" and costs {costs}." if costs else ".")

    def gain(self, found: Contrast | None) -> str:
        """What full fine-tuning gains over the taken arm; `found` is the taken arm minus full."""
        if found is None:
            return "cannot be tested against it"
        text = f"({signed(-found.difference)}, {between(-found.high, -found.low)}, {chance(found.corrected)})"
        if not found.significant:
            return f"is not measurably better or worse than it {text}"
        return f"is {'better' if sign(self.metric) * found.difference < 0 else 'worse'} {text}"

    def inference(self, taken: Arm) -> Iterator[str]:
        """What the adapter costs at inference; a fully tuned model has the base's own layers, so only noise differs."""
        apart, merged = taken.figure("latency_ratio"), taken.figure("latency_merged_ratio")
        if apart is None or taken.method == "full":
            return
        once = "it cannot be merged" if merged is None else f"{times(merged)} times once merged"
        yield f"Inference with {taken.name} takes {times(apart)} times the base's time ({once})."

    def forgetting(self, taken: Arm) -> Iterator[str]:
        known = [arm for arm in (taken, self.all.get(self.all.full)) if arm and arm.figure("forgetting")]
        shifts = list(dict.fromkeys(f"{_shift(arm.figure('forgetting'))} under {arm.name}" for arm in known))
        if shifts:
            yield f"Perplexity on general text changes by {' and by '.join(shifts)} (an increase is forgetting)."

    def elsewhere(self, taken: Arm) -> Iterator[str]:
        """Metrics in which the taken arm lacks more than the margin to the best there."""
        for metric in self.all.metrics[1:]:
            able = [arm for arm in self.arms if metric in arm.scores and math.isfinite(arm.scores[metric].value)]
            if metric not in taken.scores or not able:
                continue
            top = max(able, key=lambda arm: sign(metric) * arm.scores[metric].value)
            if self.lacks(taken, metric, top) > self.margin:
                values = f"{number(top.scores[metric].value)} against {number(taken.scores[metric].value)}"
                yield f"By {metric_label(metric)} {top.name} would be ahead ({values})."

    def basis(self) -> str:
        """How many rows and seeds, and what that allows to be said."""
        rows = plural(self.best.scores[self.metric].rows, "test row")
        seeds = sorted({arm.scores[self.metric].seeds for arm in self.arms})
        corrected = f"; p is corrected for {len(self.arms)} arms (Holm)" if len(self.arms) > 1 else ""
        if seeds == [1]:
            return (
                f"All this rests on {rows} and one seed an arm: intervals and p speak of other test rows only, not of "
                f"other training runs, so small differences may be luck until three seeds or more agree{corrected}."
            )
        span = f"{seeds[0]} to {plural(seeds[-1], 'seed')}" if len(seeds) > 1 else plural(seeds[0], "seed")
        wide = ", and two runs say little about a third, so intervals are wide" if seeds == [2] else ""
        single = "; arms with one seed have intervals over rows only" if 1 in seeds else ""
        return f"All this rests on {rows} and {span} an arm{wide}{single}{corrected}."


def cost(arm: Arm) -> tuple[float, float, float, int]:
    """What arms are ordered by, cheapest first: trainable parameters, time at inference, time in training, settings.

    Times count to two digits, for clocks are no better; what was not measured counts as the most expensive.
    """
    trainable, speed, slow = arm.figure("trainable"), arm.figure("tokens_per_second"), arm.slowdown()
    return (
        math.inf if trainable is None else trainable,
        _two_digits(math.inf if slow is None else slow),
        _two_digits(1 / speed if speed else math.inf),
        len(arm.overrides),
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}") if math.isfinite(value) else value


def _open(found: Contrast | None) -> bool:
    """Whether a test leaves the question open; without a test nothing is claimed either way."""
    return found is not None and found.p >= SIGNIFICANT


def _tested(found: Contrast) -> str:
    """ "+0.41 (0.10 to 0.72, p = 0.012)"."""
    return f"{signed(found.difference)} ({between(found.low, found.high)}, {chance(found.corrected)})"


def _named(full: Arm) -> str:
    return "" if full.name == "full" else f" ({full.name})"


def _shift(ratio: float | None) -> str:
    change = (ratio or 1.0) - 1
    return ("-" if change < 0 else "+") + percent(abs(change))


def _costs(full: Arm, taken: Arm) -> Iterator[str]:
    """What full fine-tuning takes, beside the taken arm; only what was measured of both."""
    for key, what, show in (
        ("trainable", "the trainable parameters", count),
        ("adapter_mb", "the disk space", lambda mb: f"{mb:.3g} MB"),
        ("peak_mb", "the peak memory in training", lambda mb: f"{count(mb)} MB"),
    ):
        theirs, ours = full.figure(key), taken.figure(key)
        if theirs and ours:
            yield f"{times(theirs / ours)} times {what} ({show(theirs)} against {show(ours)})"


def _failures(statistics: Statistics) -> Sequence[str]:
    failed = statistics.failures
    if not failed:
        return ()
    runs = len(failed) + sum(arm.n_seeds for arm in statistics.trained)
    arms = listing(list(dict.fromkeys(one.arm for one in failed)))
    left = "is not in this" if len(failed) == 1 else "are not in this"
    return (f"{len(failed)} of {plural(runs, 'run')} failed and {left}: {arms}.",)
