"""Who sits in which row of the cache: decoding rows first, then those whose prompt is read, then what was kept.

A forward reads neighbouring rows without gathering them, so this order is held by exchanging rows when one comes, goes
or starts to decode; that moves a row's keys and values once or twice in a request's life. Rows that nobody runs in keep
what the last request computed, until their place is needed: the least recently used goes first.
"""

from __future__ import annotations

from itertools import count

from lofi.serve.cache import RowCache
from lofi.serve.prefix import LEAST, longest
from lofi.serve.row import Kept, Row


class Places:
    """The occupants of a cache's rows, in order."""

    def __init__(self, cache: RowCache) -> None:
        self.cache = cache
        self.order: list[Row | Kept] = []  # by row of the cache
        self.decoding = 0
        self.live = 0
        self._clock = count()

    @property
    def running(self) -> list[Row]:
        """Rows that decode: the first of the cache."""
        return self.order[: self.decoding]  # type: ignore[return-value]

    @property
    def reading(self) -> list[Row]:
        """Rows whose prompt is being read: behind those that decode."""
        return self.order[self.decoding : self.live]  # type: ignore[return-value]

    @property
    def rows(self) -> list[Row]:
        """All rows with a request."""
        return self.order[: self.live]  # type: ignore[return-value]

    def fits(self, whole: int) -> bool:
        """Whether a request of so many positions can run to its end beside those that run."""
        return self.cache.fits(self.live + 1, max([whole, *(row.ticket.whole for row in self.rows)]))

    def room(self, length: int, rows: int | None = None) -> None:
        """Make room in the cache for this length; kept rows that no longer fit are forgotten."""
        length = max([length, *(row.length for row in self.rows)])
        self.cache.reserve(self.live if rows is None else rows, length)
        del self.order[max(self.live, self.cache.rows) :]
        for kept in self.order[self.live :]:
            kept.length = min(kept.length, self.cache.length)

    def enter(self, row: Row, *, reuse: bool) -> None:
        """Give a row to a request, with the longest beginning of its prompt that another row has computed."""
        self.room(0, self.live + 1)
        place, found = self.live, longest(row.tokens, row.key, self.order) if reuse else None
        donor = self.order[found.row] if found else None
        if isinstance(donor, Kept):
            donor.used = next(self._clock)
        self._vacate(place)
        if found and donor is not None:
            source = self.order.index(donor)
            self.cache.copy(source, place, found.length)
            row.length = row.cached = found.length
        self.order[place : place + 1] = [row]
        self.live += 1

    def promote(self, row: Row) -> None:
        """Its prompt is read: it decodes from now on."""
        self.lead(row)
        self.decoding += 1

    def lead(self, row: Row) -> None:
        """Make it the first of those whose prompt is read."""
        self._swap(self.order.index(row), self.decoding)

    def leave(self, row: Row, *, keep: bool, sound: bool = True) -> None:
        """A request ends; what it computed is kept for later prompts if it is sound and long enough."""
        place = self.order.index(row)
        if not sound:
            self.cache.wipe(place)
        if place < self.decoding:
            self.decoding -= 1
            self._swap(place, self.decoding)
            place = self.decoding
        self.live -= 1
        self._swap(place, self.live)
        if keep and sound and row.length >= LEAST:
            self.order[self.live] = Kept(row.key, row.tokens, row.length, next(self._clock))
            return
        self._swap(self.live, len(self.order) - 1)
        self.order.pop()

    def clear(self) -> None:
        """Everybody leaves and nothing is kept; touches no tensor, so it works on a device that does not."""
        self.order.clear()
        self.live = self.decoding = 0
        self.cache.clear()

    def _vacate(self, place: int) -> None:
        """Leave at `place`, the first row without a request, what may be overwritten."""
        if len(self.order) < self.cache.rows:
            if place < len(self.order):
                self.cache.copy(place, len(self.order), self.order[place].length)
                self.order.append(self.order[place])
        else:
            oldest = min(range(place, len(self.order)), key=lambda i: self.order[i].used)  # type: ignore[union-attr]
            self._swap(oldest, place)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            order = self.order
            self.cache.swap(one, other, max(order[one].length, order[other].length))
            order[one], order[other] = order[other], order[one]
