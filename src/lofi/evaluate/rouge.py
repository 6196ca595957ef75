"""ROUGE-1, -2, -L and -Lsum: how many of a reference's words, word pairs and word order a text has.

Knows text. Knows nothing of models or averages over rows (`intervals.py`).
Two ways of cutting text into tokens, because the field's one is wrong outside English:
    "unicode"  the default, for every script: NFC, case folded; a token is a run of letters, marks and digits, so
               Vietnamese is cut into its syllables; in scripts written without spaces (Han, kana, Thai, Lao, Khmer,
               Myanmar and kin) every character with its marks is a token. Korean keeps its spaces. Invisible joiners
               are dropped.
    "english"  what google's rouge_score does: only a-z and 0-9 count, so "má bán cá" equals "mạ bàn cà" and every
               Chinese text scores 0; there to compare with published English figures, stemmed on request.
Rejected: rouge_score itself (nltk and absl at run time, and the flaw above), a language-dependent word segmenter as the
default (two versions of it give two scores).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lofi.errors import RequestError
from lofi.evaluate.stemmer import stem as porter_stem

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# scripts that put no space between words
_UNSPACED = "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham Tai_Viet"
_INVISIBLE = "[\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"


class Score(NamedTuple):
    """One ROUGE score: `precision`, `recall` and `f1`, each 0..1."""

    precision: float
    recall: float
    f1: float


def rouge(
    prediction: str,
    references: str | Sequence[str],
    *,
    kinds: Sequence[str] = KINDS,
    language: str = "unicode",
    stem: bool = False,
) -> dict[str, Score]:
    """Score a text against one or several references.

    C. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, secs. 2, 3.1 (L) and 3.2 (Lsum: the union of
    the longest common subsequences over lines, a token counted no oftener than both texts have it).
    Several references: for each kind, the score of the reference with the highest f1 (the first of equals), as
    rouge_score's score_multi. Lines of Lsum end at a newline. A text without a token scores 0, also against itself.
    Raises  RequestError for an unknown kind or language, no reference, or stemming outside English
    Exact   "english" equals rouge_score.RougeScorer (0.1.2) to the last bit on every pair tried
    """
    _check(kinds, language, stem)
    if isinstance(references, str):
        references = [references]
    if not references:
        raise RequestError("rouge was given no reference: give at least one reference text per prediction.")
    scored = [_score_one(prediction, reference, kinds, language, stem) for reference in references]
    return {kind: max((scores[kind] for scores in scored), key=lambda score: score.f1) for kind in kinds}


def tokens(text: str, *, language: str = "unicode", stem: bool = False) -> list[str]:
    """Cut a text into the tokens that ROUGE counts (see the module's docstring)."""
    if language == "english":
        words = re.findall(r"[a-z0-9]+", text.lower())
        return [porter_stem(word) if len(word) > 3 else word for word in words] if stem else words
    # folding can undo the composition (and composing first lets it fold what belongs together), hence NFC on both sides
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    joiners, token = _unicode_patterns()
    return token.findall(joiners.sub(_joined, folded))


def _joined(invisible: Any) -> str:
    # the zero width space is where Khmer and Thai break words; the others only shape the letters around them
    return " " if invisible.group() == "\u200b" else ""


@lru_cache(maxsize=1)
def _unicode_patterns() -> tuple[Any, Any]:
    import regex

    unspaced = "".join(rf"\p{{Script={name}}}" for name in _UNSPACED.split())
    unspaced += "ー"  # the long mark of both kana: its script is Common
    token = rf"[[{unspaced}]&&[\p{{L}}\p{{N}}]]\p{{M}}*+|[[\p{{L}}\p{{M}}\p{{N}}]--[{unspaced}&&[\p{{L}}\p{{N}}]]]++"
    return regex.compile(_INVISIBLE), regex.compile(token, flags=regex.VERSION1)


def _check(kinds: Sequence[str], language: str, stem: bool) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise RequestError(f"rouge has no kind {kind!r}: use any of {', '.join(KINDS)}.")
    if language not in ("unicode", "english"):
        raise RequestError(f"rouge has no language {language!r}: use 'unicode' (every script) or 'english'.")
    if stem and language != "english":
        raise RequestError("rouge stems English words only: use language='english' with stem=True, or stem=False.")


def _score_one(prediction: str, reference: str, kinds: Sequence[str], language: str, stem: bool) -> dict[str, Score]:
    said, wanted = (tokens(text, language=language, stem=stem) for text in (prediction, reference))
    scores = {}
    for kind in kinds:
        if kind == "rougeLsum":
            lines = [_lines(text, language, stem) for text in (prediction, reference)]
            scores[kind] = _score_lsum(*lines)
        elif kind == "rougeL":
            scores[kind] = _score(lcs_length(said, wanted), len(said), len(wanted))
        else:
            scores[kind] = _score_ngrams(said, wanted, int(kind[-1]))
    return scores


def _lines(text: str, language: str, stem: bool) -> list[list[str]]:
    return [tokens(line, language=language, stem=stem) for line in text.split("\n") if line]


def _score(hits: int, said: int, wanted: int) -> Score:
    precision = hits / said if said else 0.0
    recall = hits / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return Score(precision, recall, f1)


def _score_ngrams(said: list[str], wanted: list[str], n: int) -> Score:
    ours, theirs = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (said, wanted))
    return _score((ours & theirs).total(), ours.total(), theirs.total())


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel: bit i of `open_` is 0 where the dynamic programme's column grows at a[i] (Crochemore et al., "A fast
    and practical bit-vector algorithm for the longest common subsequence problem", 2001): one big-integer sum per
    token of b.
    Exact   equal to the quadratic table; 500 x 500 tokens in about 0.2 ms
    """
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    everything = (1 << len(a)) - 1
    open_ = everything
    for token in b:
        hits = open_ & places.get(token, 0)
        open_ = ((open_ + hits) | (open_ - hits)) & everything
    return len(a) - open_.bit_count()


def _score_lsum(said: list[list[str]], wanted: list[list[str]]) -> Score:
    left_said, left_wanted = (Counter(token for line in lines for token in line) for lines in (said, wanted))
    n_said, n_wanted = left_said.total(), left_wanted.total()
    hits = 0
    for line in wanted:
        for place in sorted(set().union(*(_lcs_places(line, other) for other in said))):
            token = line[place]
            if left_said[token] > 0 and left_wanted[token] > 0:
                left_said[token] -= 1
                left_wanted[token] -= 1
                hits += 1
    return _score(hits, n_said, n_wanted)


def _lcs_places(wanted: list[str], said: list[str]) -> list[int]:
    """Which tokens of `wanted` one longest common subsequence takes.

    Of several longest ones it is the one found from the end that leaves a token of `said` only if that keeps strictly
    more than leaving a token of `wanted` would: rouge_score's choice, on which the union over lines depends.
    """
    table = _lcs_table(wanted, said)
    places = []
    i, j = len(wanted), len(said)
    while i and j:
        if wanted[i - 1] == said[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def _lcs_table(rows: list[str], columns: list[str]) -> list[list[int]]:
    """table[i][j] = LCS length of rows[:i], columns[:j]: the running maximum of max(above, diagonal + match)."""
    codes: dict[str, int] = {}
    a, b = (np.array([codes.setdefault(t, len(codes)) for t in side], dtype=np.int64) for side in (rows, columns))
    table = np.zeros((len(rows) + 1, len(columns) + 1), dtype=np.int32)
    for i, code in enumerate(a):
        np.maximum.accumulate(np.maximum(table[i, 1:], table[i, :-1] + (b == code)), out=table[i + 1, 1:])
    return table.tolist()
