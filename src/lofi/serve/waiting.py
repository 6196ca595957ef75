"""The queue: requests that have no row yet, in the order they came, bounded; any thread puts in, one takes out."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lofi.serve.row import Ticket


class Waiting:
    """Tickets in order; `changed` wakes the engine's thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def put(self, ticket: Ticket) -> None:
        """At the end; the caller holds `changed`."""
        self._tickets.append(ticket)
        self.changed.notify_all()

    def wake(self) -> None:
        """Have the engine's thread look again."""
        with self.changed:
            self.changed.notify_all()

    def first(self, most: int) -> list[Ticket]:
        """The next ones, in order."""
        with self.changed:
            return self._tickets[:most]

    def take(self, chosen: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out those chosen, in order."""
        with self.changed:
            found = [ticket for ticket in self._tickets if chosen(ticket)]
            if found:
                self._tickets = [ticket for ticket in self._tickets if ticket not in found]
            return found
