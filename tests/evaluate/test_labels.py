"""Accuracy and F1 against cases done by hand; spans against conlleval's rules."""

from __future__ import annotations

import random

import pytest

from lofi.errors import RequestError
from lofi.evaluate.labels import accuracy, macro_f1, micro_f1, span_counts, span_f1, spans


def test_one_label_a_row_by_hand():
    golds, said = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    assert accuracy(said, golds) == 0.5
    # a: right 1, predicted 1, wanted 2 -> 2/3; b: 1, 3, 1 -> 1/2; c: 0, 0, 1 -> 0
    assert macro_f1(said, golds) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3, abs=1e-12)
    assert micro_f1(said, golds) == 0.5


def test_several_labels_a_row_by_hand():
    golds, said = [{1, 2}, {2}, set(), {3}], [{1}, {2, 3}, set(), {3}]
    assert accuracy(said, golds) == 0.5  # the empty row and the last one
    # 1: 1 of 1 said, 1 wanted -> 1; 2: 1, 1, 2 -> 2/3; 3: 1, 2, 1 -> 2/3
    assert macro_f1(said, golds) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3, abs=1e-12)
    assert micro_f1(said, golds) == pytest.approx(2 * 3 / (4 + 4), abs=1e-12)


def test_lists_and_sets_of_labels_are_the_same_answer():
    assert accuracy([[2, 1], []], [{1, 2}, set()]) == 1.0


def test_micro_f1_of_one_label_a_row_is_the_accuracy():
    rng = random.Random(0)
    said, golds = ([rng.randint(0, 4) for _ in range(200)] for _ in range(2))
    assert micro_f1(said, golds) == pytest.approx(accuracy(said, golds), abs=1e-12)


def test_rows_without_any_label_score_zero_f1_and_full_accuracy():
    assert macro_f1([set()], [set()]) == micro_f1([set()], [set()]) == 0.0
    assert accuracy([set()], [set()]) == 1.0


def test_f1_equals_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = random.Random(1)
    said, golds = ([rng.choice("abcdef") for _ in range(60)] for _ in range(2))
    for average, ours in (("macro", macro_f1), ("micro", micro_f1)):
        assert ours(said, golds) == pytest.approx(sklearn.f1_score(golds, said, average=average), abs=1e-12)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-per I-per O B-loc", [("per", 1, 2), ("loc", 4, 4)]),
        ("B-per B-per I-per", [("per", 0, 0), ("per", 1, 2)]),
        ("O I-per I-per O", [("per", 1, 2)]),  # an I- without a B- begins an entity
        ("B-per I-loc", [("per", 0, 0), ("loc", 1, 1)]),  # another type begins one
        ("I-loc I-per", [("loc", 0, 0), ("per", 1, 1)]),
        ("B-x-y I-x-y", [("x-y", 0, 1)]),
        ("S-per S-per B-loc E-loc I-loc", [("per", 0, 0), ("per", 1, 1), ("loc", 2, 3), ("loc", 4, 4)]),
        ("U-per L-per", [("per", 0, 0), ("per", 1, 1)]),
        ("O O", []),
        ("", []),
    ],
)
def test_spans_are_read_as_conlleval_reads_them(tags, expected):
    assert spans(tags.split()) == expected


def test_an_entity_is_right_only_whole_and_of_the_right_type():
    golds = [["B-per", "I-per", "O", "B-loc", "O"], ["O", "O", "B-org"]]
    said = [["B-per", "I-per", "O", "B-per", "O"], ["O", "B-org", "I-org"]]
    assert span_counts(said, golds).tolist() == [[1, 2, 2], [0, 1, 1]]
    assert span_f1(said, golds) == pytest.approx(2 * 1 / 6, abs=1e-12)
    assert span_f1(golds, golds) == 1.0
    assert span_f1([["O"]], [["O"]]) == 0.0


def test_span_f1_equals_seqevals():
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    rng = random.Random(2)
    tags = ["O", "O", "B-a", "I-a", "B-b", "I-b"]
    said, golds = ([[rng.choice(tags) for _ in range(12)] for _ in range(50)] for _ in range(2))
    assert span_f1(said, golds) == pytest.approx(seqeval.f1_score(golds, said), abs=1e-12)


def test_faults_are_named():
    with pytest.raises(RequestError, match="'PER'"):
        spans(["PER"])
    with pytest.raises(RequestError, match="'B'"):
        spans(["B"])
    with pytest.raises(RequestError, match="row 1 has 2"):
        span_f1([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(RequestError, match="1 predictions"):
        accuracy([1], [1, 2])
    with pytest.raises(RequestError, match="no rows"):
        macro_f1([], [])
