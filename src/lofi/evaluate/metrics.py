"""The metrics by name: which there are, which kind of data each fits, and how answers become figures.

Knows answers and the rows they answer, no model. A figure stays additive counts per row with the function of their sums
(`Measure`) until `intervals.py` makes a value, an interval or a paired test of it. A new metric is one entry in a
table. Units: everything is 0..1 except bleu and chrf (0..100), loss (nats a token) and perplexity (1 upwards).
Rejected: the `evaluate` library (it reaches for a hub), one number per metric without rows (no interval, no test).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from lofi.errors import RequestError
from lofi.evaluate import labels as label_figures
from lofi.evaluate import text as text_figures
from lofi.evaluate.intervals import Array, Statistic, exp_ratio, mean, ratio
from lofi.evaluate.rouge import KINDS as ROUGE_KINDS
from lofi.evaluate.rouge import rouge

TEXT = ("rouge", *ROUGE_KINDS, "bleu", "chrf", "exact_match", "syllable_accuracy", "stop_rate")
LOSS = ("perplexity", "loss")
CLASSES = ("accuracy", "macro_f1", "micro_f1")
TAGS = ("span_f1", "accuracy")
METRICS = tuple(dict.fromkeys((*TEXT, *LOSS, *CLASSES, *TAGS)))

FITTING: dict[str, tuple[str, ...]] = {
    "sft": (*TEXT, *LOSS), "messages": (*TEXT, *LOSS), "text": LOSS, "classification": CLASSES,
    "token_classification": TAGS, "preference": (),
}  # fmt: skip

_DEFAULT: dict[str, tuple[str, ...]] = {
    "sft": ("rouge", "exact_match", "perplexity", "stop_rate"),
    "messages": ("rouge", "exact_match", "perplexity", "stop_rate"),
    "text": ("perplexity", "loss"), "classification": ("accuracy", "macro_f1"),
    "token_classification": ("span_f1", "accuracy"), "preference": (),
}  # fmt: skip

Extra = Mapping[str, Callable[[str, dict[str, Any]], float]]


@dataclass(frozen=True)
class Measure:
    """A figure before it is one: counts per row (N, K) and the function of their sums (..., K) -> (...)."""

    rows: Array
    statistic: Statistic


def default_metrics(kind: str) -> tuple[str, ...]:
    """What is measured on this kind of data when nothing is asked for; () where nothing can be yet (preference)."""
    return _DEFAULT[kind]


def chosen_metrics(asked: Sequence[str] | None, kind: str, extra: Extra | None = None) -> tuple[str, ...]:
    """The metrics to work out, with `rouge` spelled out as its four kinds; the kind's defaults where none are asked
    for.

    Raises  RequestError for an unknown metric (naming the nearest), one that does not fit the kind of data, a custom
            metric that takes a known name or meets data without answers, or nothing to measure at all
    """
    own = tuple(extra or ())
    wanted = tuple(asked) if asked is not None else (*default_metrics(kind), *own)
    for name in own:
        if name in METRICS:
            raise RequestError(f"the custom metric {name!r} has the name of one of lofi's: rename it.")
        if kind not in ("sft", "messages"):
            raise RequestError(f"the custom metric {name!r} judges written answers, but the data is of kind {kind}.")
    _check_known(wanted, own)
    _check_fitting([name for name in wanted if name not in own], kind)
    if not wanted:
        raise RequestError(f"nothing can be measured on data of kind {kind}: give pairs, messages, text or labels.")
    wanted = tuple(dict.fromkeys((*wanted, *own)))
    return tuple(dict.fromkeys(kind for name in wanted for kind in (ROUGE_KINDS if name == "rouge" else (name,))))


def _check_known(wanted: Sequence[str], own: Sequence[str]) -> None:
    known = (*METRICS, *own)
    unknown = [name for name in wanted if name not in known]
    if not unknown:
        return
    near = [get_close_matches(name.lower(), known, n=1, cutoff=0.4) for name in unknown]
    pairs = zip(unknown, near, strict=True)
    hints = [f"{name!r}" + (f" (nearest {match[0]!r})" if match else "") for name, match in pairs]
    plural = "metrics are" if len(unknown) > 1 else "metric is"
    raise RequestError(f"unknown {plural} asked for: {', '.join(hints)}; use any of {', '.join(known)}.")


def _check_fitting(wanted: Sequence[str], kind: str) -> None:
    fitting = FITTING[kind]
    wrong = [name for name in wanted if name not in fitting]
    if wrong:
        choice = f"use any of {', '.join(fitting)}" if fitting else "this version has no metric for it"
        raise RequestError(f"{', '.join(wrong)} cannot be measured on data of kind {kind}: {choice}.")


def text_measures(
    names: Sequence[str], answers: Sequence[Any], references: Sequence[Sequence[str]], *, language: str, stem: bool
) -> dict[str, Measure]:
    """The measures of written answers (`.text`, `.stopped`) against their references, for those names that are such."""
    texts = [answer.text for answer in answers]
    pairs = list(zip(texts, references, strict=True))
    measures = _rouge_measures([name for name in names if name in ROUGE_KINDS], pairs, language=language, stem=stem)
    made: dict[str, Callable[[], Measure]] = {
        "bleu": lambda: Measure(text_figures.bleu_counts(texts, references), text_figures.bleu_of_sums),
        "chrf": lambda: Measure(text_figures.chrf_counts(texts, references), text_figures.chrf_of_sums),
        "exact_match": lambda: mean_of([text_figures.exact_match(*pair) for pair in pairs]),
        "syllable_accuracy": lambda: Measure(
            np.array([text_figures.syllable_counts(*pair) for pair in pairs], dtype=np.float64), ratio
        ),
        "stop_rate": lambda: mean_of([answer.stopped for answer in answers]),
    }
    return measures | {name: made[name]() for name in names if name in made}


def _rouge_measures(
    kinds: Sequence[str], pairs: Sequence[tuple[str, Sequence[str]]], *, language: str, stem: bool
) -> dict[str, Measure]:
    if not kinds:
        return {}
    scores = [rouge(text, wanted, kinds=kinds, language=language, stem=stem) for text, wanted in pairs]
    return {kind: mean_of([score[kind].f1 for score in scores]) for kind in kinds}


def extra_measures(extra: Extra, answers: Sequence[Any], rows: Sequence[dict[str, Any]]) -> dict[str, Measure]:
    """The measures of the caller's own metrics: the mean over rows of function(answer's text, row)."""
    return {
        name: mean_of([function(answer.text, row) for answer, row in zip(answers, rows, strict=True)])
        for name, function in extra.items()
    }


def loss_measures(names: Sequence[str], losses: Array) -> dict[str, Measure]:
    """loss and perplexity of per-example (summed loss, tokens) (N, 2), for those names that are such."""
    made: dict[str, Statistic] = {"loss": ratio, "perplexity": exp_ratio}
    return {name: Measure(losses, made[name]) for name in names if name in made}


def class_measures(
    names: Sequence[str], predictions: Sequence[Any], golds: Sequence[Any], known: Sequence[Any]
) -> dict[str, Measure]:
    """accuracy, macro_f1 and micro_f1 of chosen labels (or lists of labels), for those names that are such."""
    measures = {}
    if "accuracy" in names:
        measures["accuracy"] = mean_of(label_figures.right_rows(predictions, golds))
    counts = label_figures.label_counts(predictions, golds, known)
    f1: dict[str, Statistic] = {
        "macro_f1": label_figures.macro_f1_of_sums, "micro_f1": label_figures.micro_f1_of_sums
    }  # fmt: skip
    return measures | {name: Measure(counts, f1[name]) for name in names if name in f1}


def tag_measures(
    names: Sequence[str], predictions: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]
) -> dict[str, Measure]:
    """span_f1 and accuracy (of single tags, over all tokens) of tagged rows, for those names that are such."""
    measures = {}
    if "span_f1" in names:
        measures["span_f1"] = Measure(label_figures.span_counts(predictions, golds), label_figures.f1_of_sums)
    if "accuracy" in names:
        pairs = zip(predictions, golds, strict=True)
        right = [(sum(a == b for a, b in zip(said, wanted, strict=True)), len(wanted)) for said, wanted in pairs]
        measures["accuracy"] = Measure(np.array(right, dtype=np.float64), ratio)
    return measures


def mean_of(values: Any) -> Measure:
    """The measure of one number per row: their mean."""
    column = np.asarray(values, dtype=np.float64)
    return Measure(np.stack([column, np.ones_like(column)], axis=1), mean)
