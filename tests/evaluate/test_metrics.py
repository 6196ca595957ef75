"""Metrics by name: unknown and unfitting ones are refused, the others are the figures of their own modules."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lofi.errors import RequestError
from lofi.evaluate import labels, text
from lofi.evaluate.intervals import bootstrap
from lofi.evaluate.metrics import (
    FITTING,
    METRICS,
    chosen_metrics,
    class_measures,
    default_metrics,
    extra_measures,
    loss_measures,
    tag_measures,
    text_measures,
)
from lofi.evaluate.rouge import KINDS, rouge

ANSWERS = [SimpleNamespace(text=text, stopped=i > 0) for i, text in enumerate(["a b c d e", "the cat sat on it", "x"])]
REFERENCES = [["a b c d f", "a b"], ["the cat sat on the mat"], ["x"]]


def value(measure) -> float:
    return bootstrap(measure.rows, measure.statistic).value


def test_rouge_is_spelled_out_and_nothing_is_measured_twice():
    assert chosen_metrics(["rouge", "rougeL", "bleu"], "sft") == (*KINDS, "bleu")


def test_the_defaults_fit_their_kind_of_data():
    for kind, fitting in FITTING.items():
        assert set(default_metrics(kind)) <= set(fitting)
        assert bool(default_metrics(kind)) == (kind != "preference")


def test_own_metrics_join_what_is_asked_for():
    own = {"execution_accuracy": lambda text, row: 1.0}
    assert chosen_metrics(["bleu"], "sft", own) == ("bleu", "execution_accuracy")
    assert chosen_metrics(["execution_accuracy"], "sft", own) == ("execution_accuracy",)
    assert chosen_metrics(None, "sft", own)[-1] == "execution_accuracy"


@pytest.mark.parametrize(
    ("asked", "kind", "own", "message"),
    [
        (["rogue"], "sft", None, r"'rogue' \(nearest 'rouge'\); use any of rouge,"),
        (["blue", "acuracy"], "sft", None, "metrics are asked for: 'blue' .*'bleu'.*'acuracy' .*'accuracy'"),
        (["accuracy"], "sft", None, "accuracy cannot be measured on data of kind sft"),
        (["bleu"], "classification", None, "use any of accuracy, macro_f1, micro_f1"),
        (["bleu"], "preference", None, "no metric"),
        (None, "preference", None, "nothing can be measured"),
        ([], "sft", None, "nothing can be measured"),
        (None, "sft", {"bleu": len}, "'bleu' has the name"),
        (None, "text", {"mine": len}, "'mine' judges written answers"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(asked, kind, own, message):
    with pytest.raises(RequestError, match=message):
        chosen_metrics(asked, kind, own)


def test_written_answers_have_the_figures_of_their_modules():
    names = (*KINDS, "bleu", "chrf", "exact_match", "syllable_accuracy", "stop_rate")
    found = text_measures(names, ANSWERS, REFERENCES, language="unicode", stem=False)
    texts = [answer.text for answer in ANSWERS]
    assert set(found) == set(names)
    assert value(found["bleu"]) == pytest.approx(text.bleu(texts, REFERENCES), abs=1e-12)
    assert value(found["chrf"]) == pytest.approx(text.chrf(texts, REFERENCES), abs=1e-12)
    scores = [rouge(*pair)["rouge2"].f1 for pair in zip(texts, REFERENCES, strict=True)]
    assert value(found["rouge2"]) == pytest.approx(np.mean(scores), abs=1e-12)
    assert value(found["exact_match"]) == pytest.approx(1 / 3, abs=1e-12)
    assert value(found["stop_rate"]) == pytest.approx(2 / 3, abs=1e-12)
    assert value(found["syllable_accuracy"]) == pytest.approx((4 + 4 + 1) / (5 + 6 + 1), abs=1e-12)


def test_rouge_can_be_that_of_english():
    pair = [SimpleNamespace(text="running má", stopped=True)], [["runs mạ"]]
    english = text_measures(["rouge1"], *pair, language="english", stem=True)
    assert value(english["rouge1"]) == 1.0
    assert value(text_measures(["rouge1"], *pair, language="unicode", stem=False)["rouge1"]) == 0.0


def test_only_what_was_asked_for_is_worked_out():
    assert set(text_measures(["bleu"], ANSWERS, REFERENCES, language="unicode", stem=False)) == {"bleu"}
    assert set(loss_measures(["loss"], np.ones((2, 2)))) == {"loss"}
    assert set(class_measures(["accuracy"], [0], [0], [0, 1])) == {"accuracy"}
    assert set(tag_measures(["accuracy"], [["O"]], [["O"]])) == {"accuracy"}


def test_loss_and_perplexity_weigh_tokens():
    losses = np.array([[10.0, 10], [0.0, 90]])
    found = loss_measures(["loss", "perplexity"], losses)
    assert value(found["loss"]) == pytest.approx(0.1, abs=1e-12)
    assert value(found["perplexity"]) == pytest.approx(np.exp(0.1), abs=1e-12)


def test_chosen_labels_have_the_figures_of_their_module():
    said, golds = ["a", "b", "b", "a"], ["a", "a", "b", "c"]
    found = class_measures(["accuracy", "macro_f1", "micro_f1"], said, golds, ["c", "b", "a", "never"])
    assert value(found["accuracy"]) == labels.accuracy(said, golds)
    assert value(found["macro_f1"]) == pytest.approx(labels.macro_f1(said, golds), abs=1e-12)
    assert value(found["micro_f1"]) == pytest.approx(labels.micro_f1(said, golds), abs=1e-12)


def test_the_known_labels_give_two_models_comparable_counts():
    one = class_measures(["macro_f1"], ["a", "a"], ["a", "b"], ["a", "b", "c"])["macro_f1"]
    other = class_measures(["macro_f1"], ["c", "b"], ["a", "b"], ["a", "b", "c"])["macro_f1"]
    assert one.rows.shape == other.rows.shape


def test_tag_accuracy_is_over_tokens_and_span_f1_over_entities():
    said, golds = [["B-x", "O", "O"], ["O"]], [["B-x", "O", "B-y"], ["O"]]
    found = tag_measures(["span_f1", "accuracy"], said, golds)
    assert value(found["accuracy"]) == 0.75
    assert value(found["span_f1"]) == labels.span_f1(said, golds) == pytest.approx(2 / 3, abs=1e-12)


def test_an_own_metric_sees_the_answer_and_its_row():
    rows = [{"n": 1}, {"n": 2}, {"n": 3}]
    found = extra_measures({"mine": lambda text, row: len(text) * row["n"]}, ANSWERS, rows)
    assert value(found["mine"]) == pytest.approx((9 + 34 + 3) / 3, abs=1e-12)


def test_every_metric_fits_some_kind_of_data():
    assert set(METRICS) == {name for fitting in FITTING.values() for name in fitting}
