"""ROUGE of our own: equal to rouge_score in English, right everywhere else."""

from __future__ import annotations

import json
import random
import unicodedata
from itertools import pairwise

import pytest

from lofi.errors import RequestError
from lofi.evaluate import rouge as ours
from lofi.evaluate.rouge import KINDS, lcs_length, rouge, tokens

WORDS = ["The", "a", "cats", "caresses", "Running", "run", "national", "relational", "don't", "it's", "12", "3.5", "İ"]
WORDS += ["tiếng", "Việt", "über", "\u212a", "_x_", "e-mail", ",", ".", "--", "漢"]  # the Kelvin sign's lower case is k


@pytest.fixture(scope="module")
def peer():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score is not installed")
    return {stem: scorer.RougeScorer(list(KINDS), use_stemmer=stem) for stem in (False, True)}


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice("   \n\n\t-"[: rng.randint(1, 7)]) for _ in range(length))


def worst_difference(peer, prediction: str, references: list[str], stem: bool) -> float:
    theirs = peer[stem].score_multi(references, prediction)
    mine = rouge(prediction, references, language="english", stem=stem)
    return max(abs(a - b) for kind in KINDS for a, b in zip(mine[kind], theirs[kind], strict=True))


@pytest.mark.parametrize("stem", [False, True])
def test_random_pairs_score_as_rouge_score_scores_them(peer, stem):
    rng = random.Random(1)
    for _ in range(700):
        prediction, *references = (random_text(rng, rng.randint(0, 30)) for _ in range(rng.randint(2, 4)))
        assert worst_difference(peer, prediction, references, stem) == 0.0


@pytest.mark.parametrize("stem", [False, True])
def test_texts_of_three_repeated_words_find_the_same_union_of_subsequences(peer, stem):
    """Few distinct words make many equally long subsequences: the choice among them decides Lsum."""
    rng = random.Random(2)
    for _ in range(700):
        texts = ["".join(rng.choice("abc") + rng.choice("  \n") for _ in range(rng.randint(1, 25))) for _ in range(2)]
        assert worst_difference(peer, texts[0], texts[1:], stem) == 0.0


@pytest.mark.parametrize("stem", [False, True])
def test_real_dialogue_summaries_score_as_rouge_score_scores_them(peer, shared, stem):
    lines = (shared / "data" / "dialogsum" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row, other in pairwise(rows):
        assert worst_difference(peer, other["summary"], row["references"], stem) == 0.0
    for row in rows[:60]:
        assert worst_difference(peer, row["dialogue"], row["references"][:1], stem) == 0.0


def test_hand_computed_scores():
    scores = rouge("the cat sat", ["the cat sat on the mat"])
    assert scores["rouge1"] == (1.0, 0.5, pytest.approx(2 / 3))
    assert scores["rouge2"] == (1.0, 0.4, pytest.approx(0.8 / 1.4))
    assert scores["rougeL"] == (1.0, 0.5, pytest.approx(2 / 3))


def test_lines_in_another_order_cost_rouge_l_but_not_rouge_lsum():
    scores = rouge("one two\nthree four", "three four\none two")
    assert scores["rougeL"].f1 == 0.5
    assert scores["rougeLsum"].f1 == 1.0


def test_vietnamese_marks_tell_words_apart():
    assert rouge("má bán cá", "mạ bàn cà")["rouge1"].f1 == 0.0
    assert rouge("Tôi yêu tiếng Việt", "Tối yếu tiếng Viết")["rouge1"].f1 == 0.25
    assert rouge("má bán cá", "mạ bàn cà", language="english")["rouge1"].f1 == 1.0  # the flaw, where it is asked for


def test_composed_and_decomposed_text_are_the_same_text():
    text = "Tôi yêu tiếng Việt, thành phố Hồ Chí Minh."
    assert tokens(unicodedata.normalize("NFD", text)) == tokens(text)
    assert tokens(text) == ["tôi", "yêu", "tiếng", "việt", "thành", "phố", "hồ", "chí", "minh"]


SCRIPTS = ["我爱北京", "ภาษาไทย", "日本語のテキスト", "ខ្មែរ", "עברית", "हिन्दी", "한국어", "ﷺ", "٣", "Ελλάς"]


@pytest.mark.parametrize("text", SCRIPTS)
def test_identical_texts_score_one_in_every_script(text):
    assert rouge(text, text)["rouge1"].f1 == 1.0
    assert rouge(text, text)["rougeLsum"].f1 == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我爱NLP模型", ["我", "爱", "nlp", "模", "型"]),
        ("カタカナー", ["カ", "タ", "カ", "ナ", "ー"]),
        ("ก็ได้ ok", ["ก็", "ไ", "ด้", "ok"]),
        ("한국어 입니다", ["한국어", "입니다"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("co\u00adop می\u200cخواهم a\u200bb", ["coop", "میخواهم", "a", "b"]),
        ("don't snake_case 3.14", ["don", "t", "snake", "case", "3", "14"]),
        ("!!! ... 😀", []),
    ],
)
def test_text_is_cut_into_the_tokens_that_the_docstring_promises(text, expected):
    assert tokens(text) == expected


def test_each_kind_takes_its_own_best_reference():
    references = ["b a d c", "a b x y z w"]
    scores = rouge("a b c d", references)
    assert scores["rouge1"] == rouge("a b c d", references[0])["rouge1"]
    assert scores["rouge2"] == rouge("a b c d", references[1])["rouge2"]


def test_texts_without_a_token_score_zero():
    assert all(score == (0.0, 0.0, 0.0) for score in rouge("", ["", "..."]).values())
    assert all(score == (0.0, 0.0, 0.0) for score in rouge("\n\n", "words here").values())


def test_the_bit_parallel_length_equals_the_table_and_does_not_depend_on_the_order():
    rng = random.Random(3)
    for _ in range(400):
        a, b = ([rng.choice("abcde") for _ in range(rng.randint(0, 70))] for _ in range(2))
        assert lcs_length(a, b) == ours._lcs_table(a, b)[-1][-1] == lcs_length(b, a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("rouge3",)}, "'rouge3'"),
        ({"language": "french"}, "'french'"),
        ({"stem": True}, "English"),
        ({"references": []}, "no reference"),
    ],
)
def test_an_impossible_request_is_one_sentence_that_names_it(arguments, message):
    with pytest.raises(RequestError, match=message):
        rouge("a", **{"references": ["a"], **arguments})
