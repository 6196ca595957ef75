"""Figures of chosen labels: accuracy, macro- and micro-F1 (one label a row or several), F1 of BIO spans.

Knows labels as hashable values (names or numbers) and tags as strings. Knows no model. As in `text.py`, each corpus
figure is additive counts per row plus a function of their sums.
Rejected: scikit-learn and seqeval at run time, for sixty lines.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from lofi.errors import RequestError
from lofi.evaluate.intervals import Array, ratio

Labels = Sequence[Hashable] | Sequence[Iterable[Hashable]]


def accuracy(predictions: Labels, golds: Labels) -> float:
    """Share of rows whose label, or whose whole set of labels, is right."""
    return float(right_rows(predictions, golds).mean())


def macro_f1(predictions: Labels, golds: Labels) -> float:
    """Mean over labels of F1; the labels are those that were predicted or are right somewhere (scikit-learn's rule)."""
    return float(macro_f1_of_sums(label_counts(predictions, golds).sum(0)))


def micro_f1(predictions: Labels, golds: Labels) -> float:
    """F1 of all labels' pooled counts; with one label a row it is the accuracy."""
    return float(micro_f1_of_sums(label_counts(predictions, golds).sum(0)))


def span_f1(predictions: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> float:
    """F1 of whole entities (type, first and last token) in tagged rows, as conlleval and seqeval's default."""
    return float(f1_of_sums(span_counts(predictions, golds).sum(0)))


def right_rows(predictions: Labels, golds: Labels) -> Array:
    """1.0 for each row whose label, or whole set of labels, is right, else 0.0: (N,)."""
    _check(predictions, golds)
    return np.array([float(_as_set(a) == _as_set(b)) for a, b in zip(predictions, golds, strict=True)])


def label_counts(predictions: Labels, golds: Labels, known: Sequence[Hashable] = ()) -> Array:
    """Per row and label: right, predicted, wanted. (N, 3 x labels), the `known` first, others as they appear."""
    _check(predictions, golds)
    said, wanted = [_as_set(label) for label in predictions], [_as_set(label) for label in golds]
    occurring = dict.fromkeys(label for row in (known, *wanted, *said) for label in row)
    column = {label: i for i, label in enumerate(occurring)}
    counts = np.zeros((len(said), 3, len(column)))
    for row, ours, theirs in zip(counts, said, wanted, strict=True):
        for kind, labels in enumerate((ours & theirs, ours, theirs)):
            row[kind, [column[label] for label in labels]] = 1
    return counts.reshape(len(said), -1)


def macro_f1_of_sums(sums: Array) -> Array:
    """Macro-F1 of summed `label_counts`; a label that occurs on neither side does not count."""
    right, said, wanted = _three(sums)
    seen = said + wanted
    f1 = np.divide(2 * right, seen, out=np.zeros_like(seen), where=seen > 0)
    return ratio(np.stack([f1.sum(-1), (seen > 0).sum(-1).astype(np.float64)], axis=-1))


def micro_f1_of_sums(sums: Array) -> Array:
    """Micro-F1 of summed `label_counts`."""
    return f1_of_sums(np.stack([part.sum(-1) for part in _three(sums)], axis=-1))


def f1_of_sums(sums: Array) -> Array:
    """F1 of sums (..., 3) [right, predicted, wanted]: 2 right / (predicted + wanted), 0 where there is neither."""
    return ratio(np.stack([2 * sums[..., 0], sums[..., 1] + sums[..., 2]], axis=-1))


def span_counts(predictions: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> Array:
    """Per row: entities right, predicted, wanted. (N, 3).

    Raises  RequestError where a row's tags differ in number, or a tag is not BIO
    """
    _check(predictions, golds)
    counts = np.empty((len(golds), 3))
    for i, (said, wanted) in enumerate(zip(predictions, golds, strict=True)):
        if len(said) != len(wanted):
            raise RequestError(f"row {i} has {len(said)} predicted tags for {len(wanted)} tokens: give one each.")
        ours, theirs = set(spans(said)), set(spans(wanted))
        counts[i] = len(ours & theirs), len(ours), len(theirs)
    return counts


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of a tagged row as (type, first token, last token).

    conlleval's reading (Tjong Kim Sang 2000): B- (S-, U-) begins one, and so does I- (E-, L-) after O, after another
    type or after an end (E-, L-, S-, U-): an I- without its B- is an entity, not an error.
    Raises  RequestError for a tag that is neither O nor a letter of BIOES/BILOU with a type
    """
    found: list[tuple[str, int, int]] = []
    before, open_type = "O", ""
    for place, tag in enumerate(tags):
        letter, _, kind = tag.partition("-")
        if letter not in tuple("OBIESLU") or (letter != "O" and not kind):
            raise RequestError(f"tag {tag!r} is not BIO: span_f1 needs tags like O, B-person, I-person.")
        if letter != "O":
            if letter in "BSU" or before in "OESLU" or kind != open_type:
                found.append((kind, place, place))
            else:
                found[-1] = (kind, found[-1][1], place)
        before, open_type = letter, kind
    return found


def _three(sums: Array) -> tuple[Array, Array, Array]:
    parts = sums.reshape(*sums.shape[:-1], 3, -1)
    return parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]


def _as_set(label: Hashable | Iterable[Hashable]) -> frozenset[Hashable]:
    if isinstance(label, (list, tuple, set, frozenset)):
        return frozenset(label)
    return frozenset([label])  # type: ignore[list-item]


def _check(predictions: Sequence[object], golds: Sequence[object]) -> None:
    if len(predictions) != len(golds):
        raise RequestError(f"{len(predictions)} predictions came with {len(golds)} answers: give one of each per row.")
    if not golds:
        raise RequestError("there are no rows to make a figure of: give at least one.")
