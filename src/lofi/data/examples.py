"""Example: one row (or window, or turn) as ids and labels, kept in four bytes a token.

Plain Python; not known here: how ids or labels were made. Rejected: lists of Python integers (ten times the memory).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lofi.data.labels import IGNORED

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


class Example:
    """Ids with labels.

    labels   CAUSAL_LM, TOKEN_CLS: one for each id, -100 = not trained; SEQ_2_SEQ_LM: the decoder's ids; SEQ_CLS: one
             class index, or a list of 0.0/1.0 (multi-label)
    row      index of the row in the records (a row may make several examples)
    prompt_length   tokens before the first trained one
    cut, cut_at     the ids that truncation removed, and before which of `input_ids` they stood
    """

    __slots__ = ("_ids", "_labels", "cut", "cut_at", "prompt_length", "row", "task")

    def __init__(
        self,
        input_ids: Sequence[int],
        labels: Sequence[int] | Sequence[float] | int,
        *,
        task: str = "CAUSAL_LM",
        row: int = 0,
        prompt_length: int = 0,
        cut: Sequence[int] = (),
        cut_at: int = 0,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is none of {TASKS}")
        if task in ("CAUSAL_LM", "TOKEN_CLS") and len(input_ids) != len(labels):  # type: ignore[arg-type]
            raise ValueError(f"{len(input_ids)} ids but {len(labels)} labels")  # type: ignore[arg-type]
        self._ids = array("i", input_ids)
        self._labels = labels if task == "SEQ_CLS" else array("i", labels)  # type: ignore[arg-type]
        self.task, self.row, self.prompt_length = task, row, prompt_length
        self.cut, self.cut_at = array("i", cut), cut_at

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"Example(task={self.task}, row={self.row}, tokens={len(self)}, trained={self.n_trained})"

    @property
    def input_ids(self) -> list[int]:
        """The ids as a list (made anew at each use)."""
        return self._ids.tolist()

    @property
    def labels(self) -> list[int] | list[float] | int:
        """The labels as lists or an integer (made anew at each use)."""
        return self._labels.tolist() if isinstance(self._labels, array) else self._labels  # type: ignore[return-value]

    @property
    def ids_buffer(self) -> array[int]:
        """The ids as stored, without a copy; not to be changed."""
        return self._ids

    @property
    def labels_buffer(self) -> array[int]:
        """The labels as stored (not for SEQ_CLS), without a copy; not to be changed."""
        assert isinstance(self._labels, array)
        return self._labels

    @property
    def size(self) -> int:
        """Tokens that the model reads: the ids, and the decoder's under SEQ_2_SEQ_LM."""
        return len(self._ids) + (len(self.labels_buffer) if self.task == "SEQ_2_SEQ_LM" else 0)

    @property
    def n_trained(self) -> int:
        """How many labels count in the loss (under CAUSAL_LM the first never does: nothing predicts it)."""
        if self.task == "SEQ_CLS":
            return 1
        labels = self.labels_buffer
        skipped = 1 if self.task == "CAUSAL_LM" and len(labels) and labels[0] != IGNORED else 0
        return len(labels) - labels.count(IGNORED) - skipped
