"""One step after another: who gets a row, whose prompt is read, the next token of every row, who has ended.

Knows requests, rows and adapters' leases; knows no threads. A request gets a row when one is free and it can run to its
end within the cache; first come, first served, but one whose adapter finds no slot is passed by a bounded number of
later ones. Whatever fails ends the requests that it concerns, with a sentence, and no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lofi.errors import LofiError
from lofi.serve.counters import Counters
from lofi.serve.forward import Forward
from lofi.serve.places import Places
from lofi.serve.request import Finish, Piece, TokenLogprob, UnknownAdapter
from lofi.serve.row import Row, Ticket
from lofi.serve.sampling import Sampler
from lofi.serve.text import Text, Vocabulary
from lofi.serve.waiting import Waiting

_LOG = logging.getLogger("lofi.serve")
_NOTHING = Piece()
_LOOK = 64
"""How many waiting requests are looked at for one whose adapter has a slot."""
_PATIENCE = 64
"""How many later requests may pass one whose adapter has no slot."""


class Scheduler:
    """Runs the requests of a queue through a model; one thread."""

    def __init__(
        self, forward: Forward, sampler: Sampler, vocabulary: Vocabulary, waiting: Waiting, *, store: Any, prefill: int
    ) -> None:
        self.forward, self.sampler, self.vocabulary, self.waiting = forward, sampler, vocabulary, waiting
        self.store = store
        self.prefill_tokens = prefill
        self.reuse = True
        self.places = Places(forward.cache)
        self.counters = Counters()
        self._seats = list(range(forward.cache.limit))
        self._slots: Any = None  # the decoding rows' slots; made anew when the rows change
        self._decoding: list[Row] = []

    # -- admit --------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Give rows to waiting requests."""
        blocked: list[Ticket] = []
        for ticket in self.waiting.first(_LOOK):
            if not self.places.fits(ticket.whole):
                break
            try:
                lease = self._lease(ticket)
            except Exception as error:
                self.waiting.remove(ticket)
                self._end(ticket, "gone" if isinstance(error, UnknownAdapter) else "error", error=_sentence(error))
                continue
            if lease is None and ticket.asked.adapter is not None:
                if ticket.passed >= _PATIENCE:
                    break
                blocked.append(ticket)
                continue
            for earlier in blocked:
                earlier.passed += 1
            self.waiting.remove(ticket)
            self._enter(ticket, lease)

    def _lease(self, ticket: Ticket) -> Any:
        return None if ticket.asked.adapter is None else self.store.lease(ticket.asked.adapter)

    def _enter(self, ticket: Ticket, lease: Any) -> None:
        asked = ticket.asked
        seat = self.sampler.enter(self._seats.pop(), asked)
        text = Text(self.vocabulary, stop=asked.stop, skip_special=asked.skip_special_tokens)
        row = Row(ticket, seat, text, None if lease is None else lease.key, lease, tokens=list(asked.prompt))
        row.slot = -1 if lease is None else lease.slot
        row.begun = time.monotonic()
        try:
            self.places.enter(row, reuse=self.reuse)
        except Exception as error:
            self._gone(row, "error", error=_sentence(error))
            raise
        self.counters.prompt_tokens += len(asked.prompt)
        if not row.missing:
            self.places.promote(row)

    # -- end ----------------------------------------------------------------------------------------------------------

    def end_overdue(self) -> None:
        """End what was cancelled and what is past its deadline, wherever it is."""
        now = time.monotonic()
        for ticket in self.waiting.take(lambda one: _overdue(one, now) is not None):
            self._end(ticket, _overdue(ticket, now) or "cancelled")
        for row in self.places.rows:
            finish = _overdue(row.ticket, now)
            if finish is not None:
                self._leave(row, finish)

    def end_all(self, finish: Finish, error: str) -> None:
        """End everything, running or waiting, without asking anything of the device."""
        rows = self.places.rows
        self.places.clear()
        for row in rows:
            self._gone(row, finish, error=error)
        for ticket in self.waiting.take(lambda _: True):
            self._end(ticket, finish, error=error)

    def _leave(self, row: Row, finish: Finish, *, error: str | None = None, piece: Piece = _NOTHING) -> None:
        """A row ends; its keys and values are sound if a token that attended to them all had finite scores."""
        self.places.leave(row, keep=self.reuse, sound=finish != "error" and row.answered > 0)
        self._gone(row, finish, error=error, piece=piece)

    def _gone(self, row: Row, finish: Finish, *, error: str | None = None, piece: Piece = _NOTHING) -> None:
        """Give back what a row held, then tell its end."""
        self._seats.append(row.seat.number)
        if row.lease is not None:
            self.store.release(row.lease)
        self._end(row.ticket, finish, error=error, piece=piece, row=row)

    def _end(
        self, ticket: Ticket, finish: Finish, *, error: str | None = None, piece: Piece = _NOTHING, row: Any = None
    ) -> None:
        self.counters.ended(finish, None if row is None else time.monotonic() - row.begun)
        if finish == "deadline":
            error = f"no end within the {ticket.asked.timeout:g} s it was given: ask for fewer tokens or more time"
        cached = 0 if row is None or row.told else row.cached
        self._tell(ticket, replace(piece, finish=finish, error=error, cached=cached))
        self.waiting.answered()

    def _tell(self, ticket: Ticket, piece: Piece) -> None:
        try:
            ticket.on_piece(piece)
        except Exception:
            _LOG.exception("request %s: whoever asked failed to take a piece; it is cancelled", ticket.id)
            ticket.cancel()

    # -- read prompts -------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """Read a chunk of the prompts that are being read: the oldest first, others beside it while there is room."""
        group = self._group()
        if not group:
            return
        width = min(group[0].missing, self.prefill_tokens)
        chunks = [row.tokens[row.length : row.length + min(row.missing, width)] for row in group]
        starts = [row.length for row in group]
        try:
            self.places.room(max(start + len(chunk) for start, chunk in zip(starts, chunks, strict=True)))
            self.forward.prefill(self.places.decoding, chunks, starts, [row.slot for row in group])
        except Exception as error:
            self._failed(group, error)
            return
        for row, chunk in zip(group, chunks, strict=True):
            row.length += len(chunk)
        for row in group:
            if not row.missing:
                self.places.promote(row)

    def _group(self) -> list[Row]:
        """Neighbouring rows that are read together, the oldest first; none is filled up to more than the oldest's."""
        reading = self.places.reading
        if not reading:
            return []
        self.places.lead(min(reading, key=lambda row: row.ticket.number))
        reading = self.places.reading
        width = min(reading[0].missing, self.prefill_tokens)
        return reading[: max(1, self.prefill_tokens // width)]

    # -- decode -------------------------------------------------------------------------------------------------------

    def decode(self) -> bool:
        """One token of every row whose prompt is read; whether any request has a row."""
        rows = self.places.running
        if not rows:
            return bool(self.places.live)
        if rows != self._decoding:
            self._decoding, self._slots = rows, self.forward.route([row.slot for row in rows])
        try:
            positions = [row.length for row in rows]
            self.places.room(max(positions) + 1)
            logits = self.forward.decode([row.tokens[row.length] for row in rows], positions, self._slots)
            chosen = self.sampler.choose(logits, [row.seat for row in rows])
        except Exception as error:
            self._failed(rows, error)
            return True
        self.counters.generated(len(rows))
        for row in rows:  # before any of them leaves: rows are exchanged up to their lengths
            row.length += 1
        for i, row in enumerate(rows):
            self._deliver(row, chosen.tokens[i], chosen.logprobs.get(i))
        return True

    def _deliver(self, row: Row, token: int, logprob: TokenLogprob | None) -> None:
        if token < 0:
            self._leave(row, "error", error=_NOT_NUMBERS)
            return
        row.tokens.append(token)
        try:
            text, finish = self._written(row, token)
        except Exception as error:
            self._failed([row], error)
            return
        logprobs = () if logprob is None else (logprob,)
        if finish is not None:
            self._leave(row, finish, piece=Piece(text=text, tokens=(token,), logprobs=logprobs))
            return
        piece = Piece(text=text, tokens=(token,), logprobs=logprobs, cached=0 if row.told else row.cached)
        row.told = True
        self._tell(row.ticket, piece)

    def _written(self, row: Row, token: int) -> tuple[str, Finish | None]:
        """What is shown of this token, and how the answer ends if it does."""
        if token in row.asked.stop_ids:
            return row.text.finish(), "stop"
        text, stopped = row.text.push(token)
        if stopped:
            return text, "stop"
        if row.answered >= row.asked.max_tokens:
            return text + row.text.finish(), "length"
        return text, None

    def _failed(self, rows: Sequence[Row], error: Exception) -> None:
        _LOG.error("a forward of %d requests failed", len(rows), exc_info=error)
        for row in rows:
            self._leave(row, "error", error=f"the model failed in this step ({_sentence(error)}): ask again")


_NOT_NUMBERS = (
    "the scores of the next token are not finite numbers: the adapter or the model holds values that are not, or the "
    "dtype is too narrow for it"
)


def _overdue(ticket: Ticket, now: float) -> Finish | None:
    if ticket.cancelled:
        return "cancelled"
    return "deadline" if ticket.deadline is not None and now > ticket.deadline else None


def _sentence(error: Exception) -> str:
    """lofi's own sentences; of other exceptions the type alone: their message may hold what is nobody's business."""
    return str(error) if isinstance(error, LofiError) else type(error).__name__
