"""Our Porter stemmer against nltk's (a peer for tests only), and against words whose stems are known by hand."""

from __future__ import annotations

import json
import random
import re

import pytest

from lofi.evaluate.stemmer import stem

ROOTS = """hope hop plan caress pon cri rel oper vile digit radic form sens commun theo geo al enjo be sk tr fl y io ay
oe"""
ENDINGS = """s es ies ed ied eed ing ings ational tional enci izer bli alli entli eli ousli ization ation ator alism
iveness fulness ousness aliti iviti biliti fulli logi logy icate ative alize iciti ical ful ness al ance ence er ic able
ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize e ll y ly"""


@pytest.fixture(scope="module")
def nltk_stem():
    porter = pytest.importorskip("nltk.stem.porter", reason="nltk is not installed")
    return porter.PorterStemmer().stem


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("caresses", "caress"), ("ponies", "poni"), ("dies", "die"), ("died", "die"), ("agreed", "agre"),
        ("hopping", "hop"), ("hoping", "hope"), ("relational", "relat"), ("happy", "happi"), ("enjoy", "enjoy"),
        ("geology", "geolog"), ("skies", "sky"), ("news", "news"), ("is", "is"), ("controll", "control"),
    ],
)  # fmt: skip
def test_known_words_have_their_known_stems(word, expected):
    assert stem(word) == expected


def test_every_root_with_every_pair_of_endings_is_stemmed_as_nltk_does(nltk_stem):
    endings = ["", *ENDINGS.split()]
    words = [root + first + second for root in ROOTS.split() for first in endings for second in endings]
    assert [word for word in words if stem(word) != nltk_stem(word)] == []


def test_random_letters_are_stemmed_as_nltk_does(nltk_stem):
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioulstyedingbz1", k=rng.randint(1, 11))) for _ in range(30_000)]
    assert [word for word in words if stem(word) != nltk_stem(word)] == []


def test_every_word_of_the_shared_english_texts_is_stemmed_as_nltk_does(shared, nltk_stem):
    words: set[str] = set()
    for name in ("dialogsum", "english_quotes", "instruct_1100", "sentence_polarity", "wnut17_ner", "hh_helpful"):
        for line in (shared / "data" / name / "train.jsonl").read_text(encoding="utf-8").splitlines():
            text = json.dumps(json.loads(line), ensure_ascii=False).lower().replace("\\n", " ")
            words.update(re.findall(r"[a-z0-9]+", text))
    assert len(words) > 20_000
    assert sorted(word for word in words if stem(word) != nltk_stem(word)) == []
