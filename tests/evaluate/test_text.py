"""BLEU and chrF equal to sacrebleu's corpus scores; exact match and syllable accuracy against cases by hand."""

from __future__ import annotations

import json
import random
import unicodedata
from itertools import zip_longest

import pytest
from sacrebleu.metrics import BLEU, CHRF

from lofi.errors import RequestError
from lofi.evaluate.text import bleu, chrf, exact_match, syllable_accuracy, syllable_counts

WORDS = ["the", "The", "cat", "sat", "on", "a", "mat", ",", ".", "3.5", "don't", "Hồ", "Chí", "Minh", "漢字", "ok!"]


def sacrebleu_of(metric, predictions, references) -> float:
    streams = [list(stream) for stream in zip_longest(*references)]  # None where a row has fewer references
    return metric.corpus_score(predictions, streams).score


def random_corpus(rng: random.Random, longest: int):
    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(0, longest)))

    rows = rng.randint(1, 9)
    return [text() for _ in range(rows)], [[text() for _ in range(rng.randint(1, 4))] for _ in range(rows)]


@pytest.mark.parametrize("longest", [2, 5, 14])
def test_bleu_equals_sacrebleu_with_an_uneven_number_of_references(longest):
    rng = random.Random(longest)
    for _ in range(120):
        predictions, references = random_corpus(rng, longest)
        assert bleu(predictions, references) == pytest.approx(sacrebleu_of(BLEU(), predictions, references), abs=1e-9)


@pytest.mark.parametrize("longest", [1, 5, 14])
def test_chrf_equals_sacrebleu_with_an_uneven_number_of_references(longest):
    rng = random.Random(longest)
    for _ in range(120):
        predictions, references = random_corpus(rng, longest)
        assert chrf(predictions, references) == pytest.approx(sacrebleu_of(CHRF(), predictions, references), abs=1e-9)


def test_both_equal_sacrebleu_on_real_restaurant_sentences(shared):
    lines = (shared / "data" / "e2e_nlg" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    references = [json.loads(line)["references"] for line in lines]
    predictions = [wanted[0] for wanted in references[1:] + references[:1]]
    theirs = sacrebleu_of(BLEU(), predictions, references)
    assert 5 < theirs < 95
    assert bleu(predictions, references) == pytest.approx(theirs, abs=1e-9)
    assert chrf(predictions, references) == pytest.approx(sacrebleu_of(CHRF(), predictions, references), abs=1e-9)


def test_decomposed_vietnamese_has_the_score_of_the_composed():
    text = "thành phố Hồ Chí Minh rất đẹp"
    decomposed = [unicodedata.normalize("NFD", text)]
    assert bleu(decomposed, [[text]]) == pytest.approx(100, abs=1e-9)
    assert chrf(decomposed, [[text]]) == pytest.approx(100, abs=1e-9)
    assert exact_match(decomposed[0], [text]) == 1.0
    assert syllable_accuracy(decomposed[0], [text]) == 1.0


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_rows_and_references_that_do_not_match_are_refused(metric):
    with pytest.raises(RequestError, match="2 predictions"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(RequestError, match="prediction 1"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(RequestError, match="prediction 0"):
        metric(["a"], ["a"])


@pytest.mark.parametrize(
    ("prediction", "expected"), [("a  b\n", 1.0), ("A b", 0.0), ("a b.", 0.0), ("c", 1.0), ("", 0.0)]
)
def test_exact_match_forgives_white_space_and_nothing_else(prediction, expected):
    assert exact_match(prediction, ["a b", "c"]) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Cá tráp biển", "Cá tráp biển.", (3, 3)),
        ("Ca tráp bien", "Cá tráp biển", (1, 3)),
        ("b c a", "a b c", (0, 3)),  # the same number: position by position
        ("a b c d", "a b c", (3, 4)),  # one made up
        ("b c", "a b c", (2, 3)),  # one left out, the rest aligned
        ("a x c d e", "a b c e", (3, 5)),
        ("x b", "b c d", (1, 3)),  # two alignments... of two edits and three: the cheaper, which has the match
        ("", "a b", (0, 2)),
        ("a b", "", (0, 2)),
        ("", "", (0, 0)),
    ],
)
def test_syllables_are_counted_as_the_docstring_says(prediction, reference, expected):
    assert syllable_counts(prediction, [reference]) == expected


def test_the_alignment_has_the_fewest_edits_and_then_the_most_matches():
    """Against the plain search over all alignments."""

    def search(a, b):
        if not a or not b:
            return len(a) + len(b), 0
        paired, left, right = search(a[1:], b[1:]), search(a[1:], b), search(a, b[1:])
        same = a[0] == b[0]
        options = [(paired[0] + (not same), paired[1] - same), (left[0] + 1, left[1]), (right[0] + 1, right[1])]
        return min(options)

    rng = random.Random(8)
    for _ in range(300):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 5))] for _ in range(2))
        if len(a) != len(b):
            assert syllable_counts(" ".join(a), [" ".join(b)]) == (-search(a, b)[1], max(len(a), len(b)))


def test_the_best_reference_counts():
    assert syllable_counts("a b", ["a x", "a b c d e", "b b"]) == (1, 2)
    assert syllable_accuracy("a b", ["x y", "a b"]) == 1.0
