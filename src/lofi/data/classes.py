"""Labelled kinds become examples: one class (or several) a text, one tag a word.

Text is framed as the tokenizer frames it ([CLS] … [SEP]); what is too long is cut on the right, inside the frame, and
counted. Labels are made in `labels`. Rejected: tagging every subword (scores then weigh words by their spelling).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lofi.data.examples import Example
from lofi.data.format import frame
from lofi.data.job import Job
from lofi.data.labels import IGNORED, Label, LabelSet, word_labels
from lofi.errors import DataError


def prepare_classes(job: Job) -> tuple[list[Example], LabelSet]:
    """One example a text, its label a class index, or a 0/1 vector where the rows have `labels`."""
    several = "labels" in job.records.rows[0]
    label_set = LabelSet.of((value for row in job.records for value in _values(row)), job.given_labels)
    head, tail = (len(part) for part in frame(job.tokenizer))
    examples: list[Example] = []
    for chunk in job.chunks():
        encoded = job.tokenizer([row["text"] for _, row in chunk], verbose=False)["input_ids"]
        for (index, row), ids in zip(chunk, encoded, strict=True):
            if len(ids) <= head + tail:
                job.fault(index, "the text becomes no token under this tokenizer; change or remove the row")
            start, stop = _cut_right(len(ids), tail, job.max_length)
            label = _class_label(job, index, row, label_set, several=several)
            kept = ids[:start] + ids[stop:]
            examples.append(Example(kept, label, task="SEQ_CLS", row=index, cut=ids[start:stop], cut_at=start))
    job.report.label_counts = label_set.counts(_indices(examples))
    return examples, label_set


def _values(row: dict[str, Any]) -> list[Label]:
    values = row["labels"] if "labels" in row else [row["label"]]
    return [int(value) if isinstance(value, bool) else value for value in values]


def _class_label(job: Job, index: int, row: dict[str, Any], labels: LabelSet, *, several: bool) -> int | list[float]:
    try:
        if several != ("labels" in row):
            raise DataError(
                "one label here, a list of labels in other rows (or the reverse); write all rows the same way"
            )
        return labels.several(_values(row)) if several else labels.index(_values(row)[0])
    except DataError as error:
        job.fault(index, str(error))
        return 0


def _indices(examples: Iterable[Example]) -> Iterable[int]:
    for example in examples:
        label = example.labels
        if isinstance(label, int):
            yield label
        else:
            yield from (place for place, value in enumerate(label) if value)


def _cut_right(length: int, tail: int, max_length: int | None) -> tuple[int, int]:
    """The slice to remove before the closing special tokens; empty where the text fits."""
    excess = length - max_length if max_length else 0
    return (length - tail - excess, length - tail) if excess > 0 else (length, length)


def prepare_tags(job: Job) -> tuple[list[Example], LabelSet]:
    """One example a sentence, each tag on the first subword of its word.

    Raises  DataError: a tokenizer that cannot say which word a token belongs to
    """
    if not getattr(job.tokenizer, "is_fast", False):
        raise DataError(
            "this tokenizer cannot say which word a token belongs to; expected a fast tokenizer; convert it"
        )
    label_set = LabelSet.of((tag for row in job.records for tag in row["tags"]), job.given_labels)
    examples: list[Example] = []
    for chunk in job.chunks():
        sentences = [row["tokens"] for _, row in chunk]
        encoded = _encode_words(job, sentences)
        for place, (index, row) in enumerate(chunk):
            tags = _tag_indices(job, index, row, label_set)
            examples.append(_tagged(job, index, encoded["input_ids"][place], encoded.word_ids(place), tags))
    job.report.label_counts = label_set.counts(
        label for example in examples for label in example.labels_buffer if label != IGNORED
    )
    return examples, label_set


def _encode_words(job: Job, sentences: list[list[str]]) -> Any:
    try:
        return job.tokenizer(sentences, is_split_into_words=True, verbose=False)
    except (AssertionError, ValueError) as error:
        raise DataError(f"this tokenizer does not take words ({error}); load it with add_prefix_space=True") from error


def _tag_indices(job: Job, index: int, row: dict[str, Any], label_set: LabelSet) -> list[int]:
    try:
        return [label_set.index(tag) for tag in row["tags"]]
    except DataError as error:
        job.fault(index, str(error))
        return [0] * len(row["tags"])


def _tagged(job: Job, index: int, ids: list[int], word_ids: list[int | None], tags: list[int]) -> Example:
    labels = word_labels(word_ids, tags)
    tail = next((count for count, word in enumerate(reversed(word_ids)) if word is not None), 0)
    start, stop = _cut_right(len(ids), tail, job.max_length)
    removed = sum(label != IGNORED for label in labels[start:stop])
    job.report.trained_tokens_cut += removed
    job.report.lost_words += len(tags) - len({word for word in word_ids if word is not None})
    kept = labels[:start] + labels[stop:]
    if all(label == IGNORED for label in kept):
        job.fault(index, "no word of this row has a token under this tokenizer; expected one at least; remove the row")
    return Example(ids[:start] + ids[stop:], kept, task="TOKEN_CLS", row=index, cut=ids[start:stop], cut_at=start)
