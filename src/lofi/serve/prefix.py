"""Which row's keys and values a new prompt may begin with: the same tokens under the same adapter, and no other.

A key names what keys and values depend on besides the tokens (an adapter's content, not its name: an adapter that is
loaded anew under the same name gets another key).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lofi.serve.row import Kept, Row

LEAST = 8
"""Shorter common beginnings are computed again: copying them saves nothing."""


class Found(NamedTuple):
    """A row to take a prefix from, and how many positions."""

    row: int
    length: int


def longest(prompt: Sequence[int], key: str | None, rows: Iterable[Row | Kept]) -> Found | None:
    """The row, by its place in the cache, with the longest usable beginning of a prompt; the last token is not used."""
    best = None
    for place, row in enumerate(rows):
        if row.key != key:
            continue
        length = common(prompt, row.tokens, min(row.length, len(prompt) - 1))
        if length >= LEAST and (best is None or length > best.length):
            best = Found(place, length)
    return best


def common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many of the first `limit` tokens agree, by halving: slices compare faster than a loop over tokens."""
    one, other = list(one[:limit]), list(other[:limit])
    low, high = 0, min(len(one), len(other))  # the first `low` agree, the answer is at most `high`
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
