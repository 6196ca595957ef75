"""The only place where labels are made: by position, never by token id.

A label of -100 (torch's ignore_index) means "not trained". Because positions decide, a pad token that is also the EOS,
or a question that contains the answer, cannot hide or add a label. Plain integers; not known here: text, tokenizers.
Rejected: masking every pad id (a model whose pad is its EOS then never learns to stop).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lofi.data.faults import nearest
from lofi.errors import DataError

IGNORED = -100
Label = int | str


def causal_labels(input_ids: Sequence[int], trained: Sequence[bool]) -> list[int]:
    """labels[i] = input_ids[i] where trained, else -100; unshifted (the model shifts).

    labels[0] is always -100: nothing predicts the first token, and in a packed row the example before must not.
    """
    labels = [token_id if flag else IGNORED for token_id, flag in zip(input_ids, trained, strict=True)]
    return [IGNORED, *labels[1:]]


def word_labels(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The tag of each word on its first subword; -100 on its other subwords and on special tokens."""
    before: list[int | None] = [None, *word_ids[:-1]]
    return [
        tags[word] if word is not None and word != previous else IGNORED
        for word, previous in zip(word_ids, before, strict=True)
    ]


class LabelSet:
    """The labels of a task in order: index -> name or number, kept with the adapter."""

    def __init__(self, values: Sequence[Label]) -> None:
        self.values = list(values)
        self._index: dict[Label, int] = {value: index for index, value in enumerate(self.values)}
        if len(self._index) != len(self.values):
            raise DataError(
                f"the labels {self.values} name one twice; expected different labels; remove the repeated one"
            )

    @classmethod
    def of(cls, found: Iterable[Label], given: Sequence[Label] | None = None) -> LabelSet:
        """The labels as given (their order kept), else those found in the data, sorted.

        Raises  DataError: data that mixes integers and strings, or that has fewer than two labels
        """
        if given is not None:
            return cls(given)
        values = set(found)
        if len({type(value) for value in values}) > 1:
            raise DataError("the labels mix integers and strings; expected one kind; write all of them as strings")
        if len(values) < 2:
            raise DataError(
                f"the data's only label is {list(values)}; expected two at least; add rows, or give data.labels"
            )
        return cls(sorted(values))  # type: ignore[type-var]

    def index(self, value: Label) -> int:
        """The index of a label; an integer is also taken as an index where all labels are names.

        Raises  DataError: no such label
        """
        if value in self._index:
            return self._index[value]
        if (
            isinstance(value, int)
            and 0 <= value < len(self.values)
            and all(isinstance(name, str) for name in self.values)
        ):
            return value
        shown = ", ".join(repr(name) for name in self.values[:20])
        raise DataError(
            f"label {value!r} is none of the known ones ({shown}){nearest(str(value), map(str, self.values))}"
        )

    def several(self, values: Sequence[Label]) -> list[float]:
        """A 0/1 vector with one place for each label (multi-label)."""
        chosen = {self.index(value) for value in values}
        return [float(index in chosen) for index in range(len(self.values))]

    def counts(self, indices: Iterable[int]) -> dict[str, int]:
        """How often each label occurs, by name, zero included."""
        result: dict[Any, int] = dict.fromkeys(range(len(self.values)), 0)
        for index in indices:
            result[index] += 1
        return {str(self.values[index]): count for index, count in result.items()}
