"""Clients of the engine in its own process: a fixed number of them, each asking its next request when one has ended.

One thread drives all of them, so that what is measured is the engine and not sixteen threads waking up. Every answer is
kept with its times. Knows no HTTP (`http_clients`).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """One answer as it came: ids, how it ended, and when it was asked, when its pieces came."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    asked_at: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each piece that held tokens came."""

    @property
    def first_token(self) -> float:
        """Seconds from asking to the first token."""
        return self.times[0] - self.asked_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens, first token left out."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def ask_all(
    engine: Any, requests: Sequence[Any], *, clients: int, cancel_after: Mapping[int, int] | None = None
) -> list[Answer]:
    """Every request's answer, in order; at most `clients` at once. Request i is cancelled at `cancel_after[i]` tokens.

    Raises  RuntimeError where the engine says nothing for a minute
    """
    cancel_after = cancel_after or {}
    answers = [Answer() for _ in requests]
    events: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
    tickets: dict[int, Any] = {}
    waiting = iter(range(len(requests)))

    def listen(number: int) -> Any:
        answer, limit = answers[number], cancel_after.get(number)

        def hear(piece: Any) -> None:
            if piece.tokens:
                answer.times.append(time.perf_counter())
                answer.tokens.extend(piece.tokens)
                if limit is not None and len(answer.tokens) >= limit and piece.finish is None:
                    events.put((number, False))
            if piece.finish is not None:
                answer.finish, answer.error = piece.finish, piece.error
                events.put((number, True))

        return hear

    def ask_next() -> None:
        number = next(waiting, None)
        if number is not None:
            answers[number].asked_at = time.perf_counter()
            tickets[number] = engine.submit(requests[number], listen(number))

    for _ in range(min(clients, len(requests))):
        ask_next()
    ended = 0
    while ended < len(requests):
        try:
            number, done = events.get(timeout=60)
        except queue.Empty:
            raise RuntimeError(f"the engine has answered nothing for a minute ({ended} answers so far)") from None
        if done:
            ended += 1
            tickets.pop(number)
            ask_next()
        elif number in tickets:
            tickets[number].cancel()
    return answers


def tokens_of(answers: Sequence[Answer]) -> int:
    """How many tokens these answers hold.  Raises  RuntimeError where one ended in an error or not at all"""
    if wrong := [answer for answer in answers if answer.finish not in ("stop", "length")]:
        raise RuntimeError(f"{len(wrong)} answers ended with {wrong[0].finish}: {wrong[0].error}")
    return sum(len(answer.tokens) for answer in answers)
