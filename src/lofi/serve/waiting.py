"""The queue: requests that have no row yet, in the order they came, bounded; any thread puts in, one takes out."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lofi.serve.row import Ticket


class Waiting:
    """Tickets in order; `changed` wakes the engine's thread, and whoever waits for the last answer."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.unanswered = 0
        """Requests that were taken and have not ended, waiting or running."""
        self._tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def put(self, ticket: Ticket) -> None:
        """At the end; the caller holds `changed`."""
        self._tickets.append(ticket)
        self.unanswered += 1
        self.changed.notify_all()

    def answered(self) -> None:
        """One of them has had its last piece."""
        with self.changed:
            self.unanswered -= 1
            if not self.unanswered:
                self.changed.notify_all()

    def wake(self) -> None:
        """Have the engine's thread look again."""
        with self.changed:
            self.changed.notify_all()

    def first(self, most: int) -> list[Ticket]:
        """The next ones, in order."""
        with self.changed:
            return self._tickets[:most]

    def remove(self, ticket: Ticket) -> None:
        """Take one out."""
        with self.changed:
            self._tickets.remove(ticket)

    def take(self, chosen: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out those chosen, in order."""
        with self.changed:
            found = [ticket for ticket in self._tickets if chosen(ticket)]
            for ticket in found:
                self._tickets.remove(ticket)
            return found
