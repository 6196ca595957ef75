"""Figures of written text besides ROUGE: BLEU and chrF through sacrebleu, exact match, syllable accuracy.

Knows predictions and their references (one or several, not the same number in every row). Corpus scores come as
additive counts per row plus the function from summed counts to the score, so that `intervals.py` can resample them.
All texts are brought to NFC first: the same Vietnamese sentence must not lose its BLEU for being typed on another
system.
Rejected: sacrebleu's own resampling (a normal interval, BLEU only against BLEU), per-sentence BLEU averaged (not BLEU).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lofi.errors import RequestError
from lofi.evaluate.intervals import Array

_BLEU_ORDER = 4
_CHRF_ORDER = 6
_CHRF_BETA = 2


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str = "13a") -> float:
    """Corpus BLEU, 0..100, with sacrebleu's defaults (13a tokens, exponential smoothing, closest reference length)."""
    return float(bleu_of_sums(bleu_counts(predictions, references, tokenize=tokenize).sum(0)))


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF2, 0..100, as sacrebleu computes it (character 1- to 6-grams without spaces, no word n-grams)."""
    return float(chrf_of_sums(chrf_counts(predictions, references).sum(0)))


def bleu_counts(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str = "13a") -> Array:
    """BLEU's counts per row, (N, 10): matching 1- to 4-grams, all of them, length, length of the closest reference.

    Papineni et al., "BLEU", 2002, as in sacrebleu (Post 2018).
    Raises  RequestError where rows and references do not match in number, or a row has no reference
    Exact   bleu_of_sums(counts.sum(0)) is sacrebleu's corpus score within rounding (1e-9)
    """
    from sacrebleu.metrics import BLEU

    _check(predictions, references)
    metric = BLEU(tokenize=tokenize)
    counts = np.empty((len(predictions), 2 * _BLEU_ORDER + 2))
    for row, prediction, wanted in zip(counts, predictions, references, strict=True):
        score: Any = metric.corpus_score([_nfc(prediction)], [[_nfc(text)] for text in wanted])
        row[:] = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    return counts


def bleu_of_sums(sums: Array) -> Array:
    """BLEU, 0..100, of summed counts (..., 10): brevity penalty times the geometric mean of the four precisions.

    The k-th precision without a match counts as 1 / (2^k x its n-grams) (sacrebleu's smoothing "exp"); without any
    match at all, or without any 4-gram, the score is 0.
    """
    right, said = sums[..., :_BLEU_ORDER], sums[..., _BLEU_ORDER:-2]
    ours, theirs = sums[..., -2], sums[..., -1]
    missing = right == 0
    smoothed = np.where(missing, 0.5 ** np.cumsum(missing, axis=-1), right)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log(smoothed / said).mean(-1)
        penalty = np.minimum(0.0, 1 - theirs / ours)
        score = 100 * np.exp(log_precision + penalty)
    return np.where(right.any(-1) & said.all(-1), score, 0.0)


def chrf_counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """chrF's counts per row, (N, 18): n-grams said, n-grams wanted, n-grams in both, for n = 1..6.

    Popović, "chrF", 2015, as in sacrebleu: of several references the one that this row scores best on.
    Raises  as `bleu_counts`
    Exact   chrf_of_sums(counts.sum(0)) is sacrebleu's corpus score within rounding (1e-9)
    """
    _check(predictions, references)
    counts = np.empty((len(predictions), 3 * _CHRF_ORDER))
    for row, prediction, wanted in zip(counts, predictions, references, strict=True):
        candidates = np.array([_chrf_row(prediction, reference) for reference in wanted], dtype=np.float64)
        row[:] = candidates[chrf_of_sums(candidates).argmax()]
    return counts


def _chrf_row(prediction: str, reference: str) -> list[int]:
    ours, theirs = _characters(prediction), _characters(reference)
    # n-grams longer than the reference cannot be wanted, so they are not held against the prediction either
    said = [a.total() if b else 0 for a, b in zip(ours, theirs, strict=True)]
    return [*said, *(b.total() for b in theirs), *((a & b).total() for a, b in zip(ours, theirs, strict=True))]


def _characters(text: str) -> list[Counter[str]]:
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    return list(extract_all_char_ngrams(_nfc(text), _CHRF_ORDER, False))


def chrf_of_sums(sums: Array) -> Array:
    """chrF2, 0..100, of summed counts (..., 18): F-score, recall twice as important, of mean precision and recall.

    The means are over those n of which both sides have n-grams.
    """
    said, wanted, both = (sums[..., i * _CHRF_ORDER : (i + 1) * _CHRF_ORDER] for i in range(3))
    used = (said > 0) & (wanted > 0)
    orders = np.maximum(used.sum(-1), 1)
    precision = np.divide(both, said, out=np.zeros_like(said), where=used).sum(-1) / orders
    recall = np.divide(both, wanted, out=np.zeros_like(said), where=used).sum(-1) / orders
    weight = _CHRF_BETA**2
    below = weight * precision + recall
    above = 100 * (1 + weight) * precision * recall
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction is one of the references, else 0.0 (NFC; white space counts as one space; case counts)."""
    said = " ".join(_nfc(prediction).split())
    return float(any(said == " ".join(_nfc(reference).split()) for reference in references))


def syllable_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Share of syllables right, 0..1: see `syllable_counts`."""
    right, total = syllable_counts(prediction, references)
    return right / total if total else 0.0


def syllable_counts(prediction: str, references: Sequence[str]) -> tuple[int, int]:
    """How many syllables are right, out of how many; a corpus's accuracy is the one's sum over the other's.

    A syllable is a run of letters, marks and digits (NFC; case counts, punctuation does not). Where both texts have the
    same number, syllable i is right if it equals syllable i of the reference. Where they have not, they are aligned
    with the fewest insertions, deletions and substitutions, and of such alignments by the one with the most equal
    pairs. The total is the longer text's number, so words left out and words made up both cost.
    Of several references the one with the highest share counts.
    """
    pairs = [_aligned(_syllables(prediction), _syllables(reference)) for reference in references]
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1))


def _aligned(said: list[str], wanted: list[str]) -> tuple[int, int]:
    if len(said) == len(wanted):
        return sum(a == b for a, b in zip(said, wanted, strict=True)), len(wanted)
    # one number per cell, edits * scale - matches, so that the least is the fewest edits and then the most matches
    scale = len(said) + len(wanted) + 1
    above = [column * scale for column in range(len(wanted) + 1)]
    for word in said:
        row = [above[0] + scale]
        for column, other in enumerate(wanted):
            through = above[column] + (-1 if word == other else scale)
            row.append(min(through, above[column + 1] + scale, row[column] + scale))
        above = row
    return -above[-1] % scale, max(len(said), len(wanted))


def _syllables(text: str) -> list[str]:
    return _syllable_pattern().findall(_nfc(text))


@lru_cache(maxsize=1)
def _syllable_pattern() -> Any:
    import regex

    return regex.compile(r"[\p{L}\p{M}\p{N}]++")


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise RequestError(
            f"{len(predictions)} predictions came with references for {len(references)}: give a list of them each."
        )
    for i, wanted in enumerate(references):
        if isinstance(wanted, str) or not wanted:
            raise RequestError(f"prediction {i} has no list of references: give a list with at least one text.")
