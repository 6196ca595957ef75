"""Where a text that is too long is cut: in its context, from the left, behind the head; never in what is trained.

Plain arithmetic on lengths. Rejected: cutting from the right (it removes the completion and its stop token, and the
model then learns never to stop) and cutting the head away (BOS and the template's opening then differ from generation).
"""

from __future__ import annotations

from collections.abc import Iterator


def cut_region(length: int, context: int, max_length: int, head: int) -> tuple[int, int] | None:
    """The slice [start, stop) to remove from the first `context` of `length` tokens so that `max_length` remain.

    At least one token of context stays, so that the first trained token is predicted from something. The head stays
    when it fits into half of what is left of the context. None where the trained part alone is too long.
    """
    excess = length - max_length
    left = context - excess  # context tokens that stay
    if left < 1:
        return None
    start = head if head <= left // 2 else min(1, head, left // 2)
    return start, start + excess


def windows(length: int, max_length: int) -> Iterator[tuple[int, int]]:
    """Slices of at most `max_length` that overlap by one token, so that every token but the first is predicted once."""
    start = 0
    while True:
        stop = min(start + max_length, length)
        yield start, stop
        if stop == length:
            return
        start = stop - 1
