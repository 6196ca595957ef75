"""From the engine's thread into the event loop: pieces of answers, with as few crossings as possible.

The engine calls back once a step and answer. The callback appends to a deque and wakes the loop only where somebody
waits for this piece and no wake-up is under way: all answers of a step cross in one, those of streams that pause cross
when the pause ends, and answers that are wanted whole cross at their end. In the loop the pieces are put together.
Knows pieces, not HTTP. Rejected: an asyncio.Queue a request with call_soon_threadsafe a piece (a system call and a
wake-up each, sixteen a step), and a thread a request.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from lofi.serve.request import Asked, Finish, Piece, TokenLogprob


class Ticket(Protocol):
    """What the engine gives for a request."""

    def cancel(self) -> None: ...


class Submits(Protocol):
    """The one thing of the engine that is needed here."""

    def submit(self, asked: Asked, on_piece: Callable[[Piece], Any]) -> Any: ...


class Bridge:
    """One event loop's letter box: any thread puts pieces in, the loop hands them to their choices."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.crossings = 0
        self._box: deque[tuple[Choice, Piece, float]] = deque()
        self._woken = False

    def put(self, choice: Choice, piece: Piece) -> None:
        """Called in the engine's thread."""
        # first the piece, then the look at who waits: `empty` and `Answers._resume` go in the other order
        self._box.append((choice, piece, time.perf_counter()))
        if not self._woken and (piece.finish is not None or choice.answers.eager):
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._cross)
            except RuntimeError:  # the loop is closed: nobody waits for this piece any more
                self._woken = False

    def _cross(self) -> None:
        self._woken = False
        self.crossings += 1
        self.empty()

    def empty(self) -> None:
        """Hand over what is there; in the loop's thread."""
        while self._box:
            choice, piece, came = self._box.popleft()
            choice.take(piece, came)


class Choice:
    """One answer as it comes in."""

    __slots__ = (
        "answers", "asked", "cached", "error", "finish", "first", "index", "last", "logprobs", "started", "texts",
        "tokens",
    )  # fmt: skip

    def __init__(self, answers: Answers, index: int, asked: Asked) -> None:
        self.answers, self.index, self.asked = answers, index, asked
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None
        self.error: str | None = None
        self.cached = 0
        self.started = time.perf_counter()
        self.first = self.last = 0.0
        """When the first and the last token came, on the clock of `started`; 0.0 before."""

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.texts)

    def take(self, piece: Piece, came: float | None = None) -> None:
        """Add one piece that came then (now); in the loop's thread. What comes after the end is dropped."""
        if self.finish is not None:
            return
        if piece.text:
            self.texts.append(piece.text)
        if piece.tokens:
            self._count(piece, time.perf_counter() if came is None else came)
        self.logprobs += piece.logprobs
        self.cached = piece.cached or self.cached
        self.finish, self.error = piece.finish, piece.error
        self.answers.told(self, piece)

    def _count(self, piece: Piece, now: float) -> None:
        gap = now - (self.last or self.started)
        self.answers.watch.tokens(len(piece.tokens), gap, first=not self.first)
        self.first = self.first or now
        self.last = now
        self.tokens += piece.tokens


class Watch(Protocol):
    """Who counts tokens and ends (metrics.py)."""

    def tokens(self, count: int, seconds: float, *, first: bool) -> None: ...

    def ended(self, choice: Choice) -> None: ...


class Answers:
    """All answers to one HTTP request."""

    def __init__(self, asked: Sequence[Asked], watch: Watch, *, streamed: bool) -> None:
        self.watch, self.streamed = watch, streamed
        self.choices = [Choice(self, index, one) for index, one in enumerate(asked)]
        self._tickets: list[Ticket] = []
        self._left = len(self.choices)
        self._news: list[tuple[Choice, Piece]] = []
        self._wake: asyncio.Future[None] | None = None
        self._bridge: Bridge | None = None
        self.eager = streamed
        """Whether somebody waits for the next piece, not only for the end."""

    def submit(self, engine: Submits, bridge: Bridge) -> None:
        """Ask the engine for all of them; where it refuses one, the others are taken back and its exception raised."""
        self._bridge = bridge
        try:
            for choice in self.choices:
                self._tickets.append(engine.submit(choice.asked, partial(bridge.put, choice)))
        except BaseException:
            self.cancel()
            raise

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return self._left == 0

    def told(self, choice: Choice, piece: Piece) -> None:
        """A choice took a piece."""
        if choice.finish is not None:
            self._left -= 1
            self.watch.ended(choice)
        if self.streamed:
            self._news.append((choice, piece))
        if self.done or self.eager:
            self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def pause(self, seconds: float) -> None:
        """Let what comes within `seconds` gather and be told at once; the end is told when it comes."""
        self.eager = False
        asyncio.get_running_loop().call_later(seconds, self._resume)

    def _resume(self) -> None:
        self.eager = True
        if self._bridge is not None:
            self._bridge.empty()
        if self._news:
            self._rouse()

    async def whole(self) -> None:
        """Wait until every answer has ended."""
        while not self.done:
            await self._woken()

    async def news(self) -> list[tuple[Choice, Piece]]:
        """What came since the last call, at least one piece; [] when everything has ended and was told."""
        while not self.done and not (self.eager and self._news):
            await self._woken()
        found, self._news = self._news, []
        return found

    async def _woken(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake

    def cancel(self) -> None:
        """Take back what has not ended; the engine frees its rows and says "cancelled"."""
        for ticket, choice in zip(self._tickets, self.choices, strict=False):
            if choice.finish is None:
                ticket.cancel()

    def end(self, finish: Finish, sentence: str) -> None:
        """End what has not ended, at once and whatever the engine does; in the loop's thread."""
        self.cancel()
        if self._bridge is not None:
            self._bridge.empty()  # what came before is told before
        for choice in self.choices:
            choice.take(Piece(finish=finish, error=sentence))
