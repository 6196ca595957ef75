"""Faults of a data file, gathered so that one run names several of them.

This file knows how faults are joined into one message; it does not know what a fault is. Rejected: stopping at the
first fault (a file of 300 broken lines then costs 300 runs).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lofi.errors import DataError

SHOWN = 5  # faults spelled out in one message; the others are counted


class Faults:
    """What is wrong with one source, in order of appearance."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._first: list[str] = []

    def add(self, where: str, text: str) -> None:
        """Note one fault at `where` ("file.jsonl:17"); only the first few keep their words."""
        self.count += 1
        if len(self._first) < SHOWN:
            self._first.append(f"{where}: {text}")

    def raise_if_any(self) -> None:
        """Raise one DataError naming the first faults and how many there are; nothing when there are none."""
        if not self.count:
            return
        if self.count == 1:
            raise DataError(self._first[0])
        rest = f"; and {self.count - len(self._first)} more" if self.count > len(self._first) else ""
        raise DataError(f"{self.source} has {self.count} faults: {'; '.join(self._first)}{rest}")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; nearest 'x'" for the known name most like `name`, or nothing when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; nearest {found[0]!r}" if found else ""
