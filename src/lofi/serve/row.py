"""One request on its way through the engine: a ticket for whoever asked, a row while it runs, what stays afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.serve.request import Asked, OnPiece
from lofi.serve.sampling import Seat
from lofi.serve.text import Text


class Ticket:
    """A submitted request; `cancel` may be called from any thread, at any time, more than once."""

    def __init__(self, number: int, asked: Asked, on_piece: OnPiece, *, now: float, wake: Callable[[], None]) -> None:
        self.number = number
        self.asked = asked
        self.on_piece = on_piece
        self.submitted = now
        self.deadline = None if asked.timeout is None else now + asked.timeout
        self.passed = 0
        """How many later requests were let in before it while its adapter had no slot."""
        self._wake = wake
        self._cancelled = threading.Event()

    @property
    def id(self) -> str:
        """Its name among the requests of one engine."""
        return f"r{self.number}"

    @property
    def whole(self) -> int:
        """Positions it may come to need: the last token of an answer is never attended to."""
        return len(self.asked.prompt) + self.asked.max_tokens - 1

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End it before its next step, with finish "cancelled"; nothing happens where it has ended."""
        self._cancelled.set()
        self._wake()


@dataclass(eq=False, slots=True)
class Kept:
    """Keys and values that a finished request left in its row: of its first `length` tokens, under one adapter."""

    key: str | None
    tokens: Sequence[int]
    length: int
    used: int
    """When it was last of use, by a clock of its own."""


@dataclass(eq=False, slots=True)
class Row:
    """A request that has a row in the cache; keys and values of its first `length` tokens are there."""

    ticket: Ticket
    seat: Seat
    text: Text
    key: str | None
    """What keys and values depend on besides the tokens: the adapter's content; None for the base."""
    lease: Any = None
    slot: int = -1
    length: int = 0
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    """The prompt, then the answer."""
    begun: float = 0.0
    told: bool = False
    """Whether a piece was delivered."""

    @property
    def asked(self) -> Asked:
        return self.ticket.asked

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.asked.prompt)

    @property
    def missing(self) -> int:
        """Tokens of the prompt that have no keys and values yet and are not the next step's input."""
        return max(0, len(self.asked.prompt) - 1 - self.length)
