"""The pictures of a study: metric against parameters, against rank, against what it costs, and the loss curves.

Knows statistics and records. Knows not how a picture is made (`drawing`). A picture is drawn only where it has
something to show: two arms, two ranks, a cost that was measured. Arms are told apart by family (the arm without its
rank), or by method where there are more families than colours; many loss curves stand in several panels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lofi.study.drawing import DISTINCT, Frame, Labels, across, level, mark, picture, stroke, swatch, upwards, whisker
from lofi.study.record import BASE, RunRecord
from lofi.study.statistics import Arm, Score, Statistics, sign
from lofi.study.wording import between, metric_label, number

RANK = "lora.r"
LONGEST_TAG = 16
COSTS = {
    "peak_mb": "peak memory in training, MB",
    "train_seconds": "time to train, seconds",
    "inference": "time to answer, times the base's",
}


@dataclass(frozen=True)
class Plot:
    """A picture with what it is called, what to read it by, and its legend [(swatch, name)]."""

    title: str
    note: str
    svg: str
    legend: tuple[tuple[str, str], ...]


def plots(statistics: Statistics, records: Sequence[RunRecord]) -> list[Plot]:
    """Every picture that has content, in the order of the page, of the first metric."""
    if not statistics.metrics:
        return []
    known = _Known(statistics, statistics.metrics[0])
    found = [by_parameters(known), by_rank(known), *(by_cost(known, cost) for cost in COSTS), *curves(known, records)]
    return [plot for plot in found if plot is not None]


def further_plots(statistics: Statistics) -> list[Plot]:
    """The other metrics against parameters and rank."""
    known = [_Known(statistics, metric) for metric in statistics.metrics[1:]]
    return [plot for one in known for plot in (by_parameters(one), by_rank(one)) if plot is not None]


class _Known:
    """The arms with a finite figure in a metric, and which colour each has on every picture."""

    def __init__(self, statistics: Statistics, metric: str) -> None:
        self.metric = metric
        self.label = metric_label(metric)
        self.axis = self.label + (" (less is better)" if sign(metric) < 0 else "")
        self.base = statistics.base
        able = [arm for arm in statistics.trained if metric in arm.scores]
        self.arms = [arm for arm in able if math.isfinite(arm.scores[metric].value)]
        names = dict.fromkeys(family(arm) for arm in self.arms)
        self.group: Callable[[Arm], str] = family if len(names) <= DISTINCT else lambda arm: arm.method
        self.groups = list(dict.fromkeys(self.group(arm) for arm in self.arms))

    def score(self, arm: Arm) -> Score:
        return arm.scores[self.metric]

    def headed(self, against: str) -> str:
        """What a picture is called: "Loss against rank"."""
        return f"{self.label[:1].upper()}{self.label[1:]} against {against}"

    def series(self, arm: Arm) -> int:
        return self.groups.index(self.group(arm))

    def title(self, arm: Arm, cost: str) -> str:
        score = self.score(arm)
        return f"{arm.name}: {self.label} {number(score.value)} ({between(score.low, score.high)}), {cost}"

    def heights(self, arms: Iterable[Arm]) -> list[float]:
        """Every value that a vertical axis must hold; the base's too, unless the arms then share half of it or less."""
        scores = [self.score(arm) for arm in arms]
        ends = [end for one in scores for end in (one.value, one.low, one.high) if end is not None]
        base, room = self.base_value(), max(ends) - min(ends)
        near = base is not None and min(ends) - room <= base <= max(ends) + room
        return [*ends, base] if base is not None and near else ends

    def base_value(self) -> float | None:
        score = self.base.scores.get(self.metric) if self.base else None
        return score.value if score is not None and math.isfinite(score.value) else None

    def base_line(self, frame: Frame) -> str:
        value = self.base_value()
        return "" if value is None else level(frame, value, f"base {number(value)}")

    def legend(self, arms: Iterable[Arm], *, line: bool = False) -> tuple[tuple[str, str], ...]:
        names = dict.fromkeys(self.group(arm) for arm in arms)
        return tuple((swatch(self.groups.index(name), line=line), name) for name in names)


def family(arm: Arm) -> str:
    """An arm's name without its rank: the arms of one line in the picture over ranks."""
    return re.sub(r"(^| )r=\d+(?= |$)", "", arm.name).strip() or arm.method


def tag(arm: Arm, group: str, *, alone: bool) -> str:
    """What stands beside a mark: "r=4" of "lora r=4", the whole name where a group has one arm; "" if too long."""
    if alone:
        return next((name for name in (arm.name, group) if len(name) <= LONGEST_TAG), "")
    rest = arm.name.removeprefix(group).strip() if arm.name.startswith(group) else ""
    rank = re.search(r"(?:^| )(r=\d+)(?= |$)", arm.name)
    return rest if 0 < len(rest) <= LONGEST_TAG else rank[1] if rank else ""


def by_parameters(known: _Known) -> Plot | None:
    """The metric against trainable parameters, on a logarithmic axis, with intervals."""
    points = [(arm, arm.figure("trainable") or 0.0) for arm in known.arms]
    points = [(arm, x) for arm, x in points if x > 0]
    if len(points) < 2:
        return None
    frame = Frame(
        across([x for _, x in points], log=True),
        upwards(known.heights(arm for arm, _ in points)),
        "trainable parameters",
        known.axis,
    )
    drawn = _points(known, frame, points, lambda x: f"{x:,.0f} trainable parameters")
    note = "Bars are 95 % intervals; the dashed line is the base."
    return Plot(
        known.headed("trainable parameters"),
        note,
        picture([frame.drawn(), known.base_line(frame), *drawn], f"{known.label} of each arm by trainable parameters"),
        known.legend(arm for arm, _ in points),
    )


def _points(
    known: _Known,
    frame: Frame,
    points: Sequence[tuple[Arm, float]],
    cost: Callable[[float], str],
    kept: Sequence[Arm] = (),
) -> Iterator[str]:
    """Intervals, marks and labels; those not `kept` (where some are) fade."""
    places = {arm.name: frame.at(x, known.score(arm).value) for arm, x in points}
    labels = Labels(places.values())
    for arm, _ in points:
        low, high = known.score(arm).low, known.score(arm).high
        if low is not None and high is not None and not kept:
            yield whisker(places[arm.name][0], frame.y.place(low), frame.y.place(high), known.series(arm))
    for arm, x in points:
        yield mark(places[arm.name], known.series(arm), known.title(arm, cost(x)), faded=bool(kept) and arm not in kept)
    for arm, _ in points:
        group = known.group(arm)
        words = tag(arm, group, alone=[known.group(one) for one in known.arms].count(group) == 1)
        if words and (not kept or arm in kept):
            yield labels.beside(places[arm.name], words)


def by_rank(known: _Known) -> Plot | None:
    """The metric against the rank, a line for each family of which two ranks or more were run."""
    lines: dict[str, list[tuple[int, Arm]]] = {}
    for arm in known.arms:
        if isinstance(arm.overrides.get(RANK), int):
            lines.setdefault(family(arm), []).append((arm.overrides[RANK], arm))
    lines = {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items() if len(line) > 1}
    lines = {name: line for name, line in lines.items() if len({rank for rank, _ in line}) > 1}
    shown = dict(list(lines.items())[:DISTINCT])
    if not shown:
        return None
    arms = [arm for line in shown.values() for _, arm in line]
    ranks = sorted({rank for line in shown.values() for rank, _ in line})
    frame = Frame(across(ranks, log=True), upwards(known.heights(arms)), "rank", known.axis)
    parts = [frame.drawn(ranks), known.base_line(frame)]
    series = [known.series(line[0][1]) for line in shown.values()]  # as in the other pictures, where that tells apart
    series = series if len(set(series)) == len(series) else list(range(len(series)))
    for one, line in zip(series, shown.values(), strict=True):
        parts += _rank_line(known, frame, line, one)
    left = len(lines) - len(shown)
    note = "Bars are 95 % intervals." + (f" {left} more lines are in the table only." if left else "")
    legend = tuple((swatch(one), name) for one, name in zip(series, shown, strict=True))
    return Plot(known.headed("rank"), note, picture(parts, f"{known.label} by rank"), legend)


def _rank_line(known: _Known, frame: Frame, line: Sequence[tuple[int, Arm]], series: int) -> Iterator[str]:
    places = [frame.at(rank, known.score(arm).value) for rank, arm in line]
    yield stroke(places, series)
    for place, (rank, arm) in zip(places, line, strict=True):
        low, high = known.score(arm).low, known.score(arm).high
        if low is not None and high is not None:
            yield whisker(place[0], frame.y.place(low), frame.y.place(high), series)
        yield mark(place, series, known.title(arm, f"rank {rank}"))


def by_cost(known: _Known, cost: str) -> Plot | None:
    """The metric against a cost: arms that nothing cheaper beats are joined, the others fade."""
    points = [(arm, x) for arm in known.arms if (x := _cost(arm, cost))]
    if len(points) < 2 or len({x for _, x in points}) < 2:
        return None
    front = frontier([(x, sign(known.metric) * known.score(arm).value) for arm, x in points])
    kept = [points[place] for place in front]
    heights = known.heights(arm for arm, _ in points)
    wide = max(x for _, x in points) / min(x for _, x in points) > 8
    frame = Frame(across([x for _, x in points], log=wide, least=0.2), upwards(heights), COSTS[cost], known.axis)
    line = _stairs([frame.at(x, known.score(arm).value) for arm, x in kept])
    drawn = _points(known, frame, points, lambda x: f"{number(x)} ({COSTS[cost]})", [arm for arm, _ in kept])
    return Plot(
        known.headed(COSTS[cost].partition(",")[0]),
        "Joined: the arms that no cheaper arm beats. Faded: those that one does.",
        picture([frame.drawn(), known.base_line(frame), line, *drawn], f"{known.label} by {COSTS[cost]}"),
        known.legend(arm for arm, _ in points),
    )


def _cost(arm: Arm, cost: str) -> float | None:
    return arm.slowdown() if cost == "inference" else arm.figure(cost)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the (cost, quality) points that no other is at least as cheap and better than, cheapest first."""
    best, found = -math.inf, []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            found.append(place)
    return found


def _stairs(places: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline class="front" points="{points}"/>' if len(places) > 1 else ""


Line = list[tuple[float, float]]


def curves(known: _Known, records: Sequence[RunRecord]) -> Iterator[Plot]:
    """Loss over steps, a line an arm (the mean over its seeds); a panel a method where the arms are many."""
    for key, what in (("eval_curve", "validation loss"), ("curve", "training loss")):
        lines = {arm.name: mean_curve([getattr(one, key) for one in _runs(records, arm)]) for arm in known.arms}
        lines = {name: line for name, line in lines.items() if len(line) > 1}
        if lines:
            yield from _panels(known, lines, what)
            return


def mean_curve(found: Iterable[Sequence[tuple[int, float]]]) -> Line:
    """The mean over runs at every step that all of them have; points that are not finite are left out."""
    runs = [{step: loss for step, loss in one if math.isfinite(loss)} for one in found]
    steps = set.intersection(*map(set, runs)) if runs else set()
    return [(float(step), sum(run[step] for run in runs) / len(runs)) for step in sorted(steps)]


def _runs(records: Sequence[RunRecord], arm: Arm) -> Iterator[RunRecord]:
    return (one for one in records if one.arm == arm.name and one.done and one.arm != BASE)


def _panels(known: _Known, lines: Mapping[str, Line], what: str) -> Iterator[Plot]:
    if len(lines) <= DISTINCT:
        yield _panel(lines, lines, what, "")
        return
    for title, own in _shared_out({arm.name: arm.method for arm in known.arms if arm.name in lines}):
        yield _panel(lines, {name: lines[name] for name in own}, what, title)


def _shared_out(method: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Arms by panel: a method's own where it has several, the others together; no panel of more than can be told."""
    groups: dict[str, list[str]] = {}
    for name, one in method.items():
        several = list(method.values()).count(one) > 1
        groups.setdefault(one if several else "one arm a method", []).append(name)
    for title, names in groups.items():
        for start in range(0, len(names), DISTINCT):
            part = f" ({start // DISTINCT + 1})" if len(names) > DISTINCT else ""
            yield title + part, names[start : start + DISTINCT]


def _panel(every: Mapping[str, Line], own: Mapping[str, Line], what: str, panel: str) -> Plot:
    """The `own` lines in colour over `every` other one, faded."""
    points = [point for line in every.values() for point in line]
    frame = Frame(across([x for x, _ in points]), upwards(_without_start(every.values())), "optimizer steps", what)
    parts = [frame.drawn()]
    parts += [stroke([frame.at(*p) for p in line], 0, faded=True) for name, line in every.items() if name not in own]
    parts += [
        stroke([frame.at(*p) for p in line], series, title=f"{name}: {what} {number(line[-1][1])} at the end")
        for series, (name, line) in enumerate(own.items())
    ]
    title = f"{what.capitalize()} over steps" + (f": {panel}" if panel else "")
    note = "Mean over seeds, nats a token." + (" The other arms are faded." if panel else "")
    legend = tuple((swatch(series, line=True), name) for series, name in enumerate(own))
    return Plot(title, note, picture(parts, title), legend)


def _without_start(lines: Iterable[Line]) -> list[float]:
    """Heights for an axis that the first points, often far above all others, do not rule: lines leave it at the top."""
    lines = list(lines)
    later = [y for line in lines for _, y in line[1:]]
    starts = [line[0][1] for line in lines]
    room = max(later) - min(later)
    return [*later, min(max(starts), max(later) + room)]
