"""Job: what one run of `prepare` works with, so that the functions for each kind of data take one argument.

Holds, and decides nothing. Rejected: a class with a method a kind (kinds then share state that they do not need).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lofi.data.faults import Faults
from lofi.data.format import TextFormat
from lofi.data.labels import Label
from lofi.data.records import Records
from lofi.data.report import DataReport
from lofi.errors import DataError

CHUNK = 2048  # rows that are text and pieces at one time; bounds memory, changes no result


@dataclass
class Job:
    """What one run of `prepare` works with."""

    records: Records
    tokenizer: Any
    task: str
    kind: str
    max_length: int | None
    text_format: TextFormat | None
    given_labels: Sequence[Label] | None
    faults: Faults
    report: DataReport

    def chunks(self) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """Rows with their indices, a bounded number at a time."""
        for start in range(0, len(self.records), CHUNK):
            yield list(enumerate(self.records.rows[start : start + CHUNK], start))

    def fault(self, row: int, text: str) -> None:
        self.faults.add(self.records.where(row), text)

    @property
    def format(self) -> TextFormat:
        """The text format, for the kinds of data that have one."""
        if self.text_format is None:
            raise DataError(f"{self.kind} rows have no text format; this is a fault of lofi, please report it")
        return self.text_format
