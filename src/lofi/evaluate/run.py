"""Evaluation by name: the base beside its adapters on the same rows, as figures with intervals and a paired test.

Knows a model with its adapters, records, and the names of metrics. What a metric is stands in `metrics.py`; how text is
framed, in the data room. Decoding is greedy unless asked otherwise. Every adapter answers exactly the rows that the
base answers, so each difference is tested in pairs.
Rejected: separate runs compared by eye (two overlapping intervals say little about the difference of the same rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from lofi.errors import RequestError
from lofi.evaluate.intervals import bootstrap, paired_test
from lofi.evaluate.metrics import Extra, Measure, chosen_metrics
from lofi.evaluate.sampling import Sampling
from lofi.evaluate.subjects import Subject, subject_of


@dataclass(frozen=True)
class Row:
    """One figure: whose, of what, with its 95 % interval (None where a single row cannot have one) over n rows."""

    who: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """One paired test: `who` minus the base in `metric`, its 95 % interval and its two-sided p (None with one row)."""

    who: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    p: float | None

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to evaluate; every default is the one that the documented figures were made with."""

    max_new_tokens: int = 128
    """Longest answer, tokens."""
    batch_tokens: int = 8192
    """Tokens per batch, padding and room for answers included."""
    max_length: int | None = None
    """Longest row, tokens: prompts are cut as in training; None: the model's context."""
    language: str = "unicode"
    """ROUGE's tokens: "unicode" or "english" (as rouge_score)."""
    stem: bool = False
    """ROUGE on Porter stems (english only)."""
    seed: int = 0
    """Of the bootstrap."""
    resamples: int = 1000
    """Bootstrap resamples."""
    sampling: Sampling | str | None = None
    """None: greedy; a Sampling; or "model": the model's generation config."""
    labels: tuple[Any, ...] | None = None
    """The label names in the model's order, where the adapter's record has them; None: as the data room finds them."""
    on_progress: Callable[[str, int, int], None] | None = None
    """Called with (who and what, done, of how many)."""


@dataclass(frozen=True)
class Evaluation(Sequence[Row]):
    """The figures, as a sequence of rows, with what they were made of."""

    rows: list[Row]
    comparison: list[Comparison]
    answers: dict[str, list[Any]] = field(repr=False)
    """Per who, what was generated (text, ids, stopped) or chosen, in the order of the records."""
    measures: dict[str, dict[str, Measure]] = field(repr=False)
    notes: list[str]
    """What a reader of the figures must know: how ROUGE cut words, how many prompts were cut."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def value(self, who: str, metric: str) -> float:
        """One figure; KeyError where there is none."""
        found = {(row.who, row.metric): row.value for row in self.rows}
        return found[who, metric]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON, under the keys that every verb uses."""
        return {
            "results": [row.to_dict() for row in self.rows],
            "comparison": [row.to_dict() for row in self.comparison],
            "notes": list(self.notes),
        }


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Any,
    metrics: Sequence[str] | None = None,
    *,
    who: Mapping[str, Any] | None = None,
    text_format: Any = None,
    extra: Extra | None = None,
    options: Options | None = None,
) -> Evaluation:
    """Measure a model, and each of its adapters beside it, on the same records.

    metrics  names (see metrics.METRICS; `rouge` gives four rows); None: default_metrics(records.kind)
    who      {name in the rows: adapter's name, list of names, or None for the base}; None: the base and every adapter
    extra    {name: function(answer's text, row) -> float}: the caller's own metrics of written answers
    Intervals and tests resample rows (examples, where a long row makes several); all use the same draws.
    Raises   RequestError for an unknown or unfitting metric or model, before anything runs; TargetError for an adapter
             that the model does not have
    """
    options = options or Options()
    names = chosen_metrics(metrics, records.kind, extra)
    people = dict(who) if who is not None else _everyone(model)
    if not people:
        raise RequestError("nobody was named to evaluate: give who={'base': None} or an adapter's name.")
    subject = subject_of(model, tokenizer, records, names=names, text_format=text_format, extra=extra, options=options)
    answers, measures = {}, {}
    for name, adapter in people.items():
        with _speaking(model, adapter):
            answers[name], found = subject.ask(name)
        measures[name] = {metric: found[metric] for metric in names}
    base = next((name for name, adapter in people.items() if adapter is None), None)
    return _evaluation(answers, measures, base, subject, options)


def side_by_side(evaluations: Sequence[Evaluation], *, base: str, options: Options | None = None) -> Evaluation:
    """Evaluations of different models on the same records as one, everyone tested against `base`.

    Raises  RequestError where two have the same name in their rows, nobody is called `base`, or the rows differ in
    number
    """
    options = options or Options()
    names = [name for one in evaluations for name in one.measures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or base not in names:
        problem = f"{', '.join(twice)} occurs twice" if twice else f"nobody is called {base!r}"
        raise RequestError(f"these evaluations cannot stand side by side ({problem} in {', '.join(names)}): rename.")
    measures = {name: found for one in evaluations for name, found in one.measures.items()}
    return Evaluation(
        rows=[row for one in evaluations for row in one.rows],
        comparison=_compared(measures, base, options),
        answers={name: answer for one in evaluations for name, answer in one.answers.items()},
        measures=measures,
        notes=list(dict.fromkeys(note for one in evaluations for note in one.notes)),
    )


def _everyone(model: Any) -> dict[str, Any]:
    from lofi.adapters.registry import adapters_of

    return {"base": None} | {name: name for name in adapters_of(model)}


def _speaking(model: Any, adapter: Any) -> AbstractContextManager[Any]:
    from lofi.adapters.switch import adapters_off, using

    return adapters_off(model) if adapter is None else using(model, adapter)


def _evaluation(
    answers: dict[str, list[Any]],
    measures: dict[str, dict[str, Measure]],
    base: str | None,
    subject: Subject,
    options: Options,
) -> Evaluation:
    rows = []
    for name, found in measures.items():
        for metric, measure in found.items():
            figure = bootstrap(measure.rows, measure.statistic, seed=options.seed, n=options.resamples)
            rows.append(Row(name, metric, *figure, n=len(measure.rows)))
    comparison = [] if base is None else _compared(measures, base, options)
    return Evaluation(rows, comparison, answers, measures, subject.notes)


def _compared(measures: dict[str, dict[str, Measure]], base: str, options: Options) -> list[Comparison]:
    found = []
    for name, ours in measures.items():
        for metric, measure in ours.items():
            if name == base or metric not in measures[base]:
                continue
            theirs = measures[base][metric].rows
            tested = paired_test(measure.rows, theirs, measure.statistic, seed=options.seed, n=options.resamples)
            found.append(Comparison(name, metric, *tested))
    return found
