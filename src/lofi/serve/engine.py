"""The engine: requests go in from any thread, pieces of their answers come out of its own, one batch for all of them.

    engine = Engine(model, tokenizer, store, rows=16)
    engine.start()
    ticket = engine.submit(Asked(prompt=ids, adapter="law"), on_piece=print)

Continuous batching: a step admits waiting requests, reads a chunk of their prompts, and decodes one token of every row,
each under its own adapter. What a request gets is what `generate` gives it alone, whatever else is in the batch.
Knows threads, the queue and its bound; what a step does is the scheduler's, what a model needs is proved at
construction. Rejected: transformers' continuous batching (its prefix sharing gives one adapter's keys to another, and
its pages need attention kernels of their own).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch

from lofi.errors import RequestError
from lofi.evaluate.generation import context_length
from lofi.serve.cache import RowCache
from lofi.serve.forward import Forward
from lofi.serve.request import Asked, Draining, OnPiece, Overloaded, Stats, UnknownAdapter, check
from lofi.serve.row import Ticket
from lofi.serve.sampling import Sampler
from lofi.serve.scheduler import Scheduler, whole
from lofi.serve.text import Vocabulary
from lofi.serve.waiting import Waiting

_LOG = logging.getLogger("lofi.serve")
_IDLE = 0.05
"""Seconds between looks at what waits for something that wakes nobody: a deadline, a slot."""


class Engine:
    """Answers many requests at once over one model; `start` it, `submit` to it, `stop` it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: Any = None,
        *,
        rows: int = 16,
        queue: int = 256,
        context: int | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int = 512,
    ) -> None:
        """rows run at once and `queue` more wait; context is the most positions of one request (default: the model's),
        cache_tokens those of all rows together, prefill_tokens those of prompts read in one step.
        """
        model.eval()
        self.rows, self.queue = rows, queue
        stated = context_length(model)
        self.context = context or stated or 4096
        cache = RowCache(rows=rows, tokens=cache_tokens or rows * (-(-self.context // 64) * 64))
        self.vocabulary = model.config.get_text_config().vocab_size
        forward = Forward(model, cache, None if store is None else store.bank)
        sampler = Sampler(seats=rows, vocabulary=self.vocabulary, device=model.device)
        self.store = store
        self._waiting = Waiting()
        self._scheduler = Scheduler(
            forward, sampler, Vocabulary(tokenizer), self._waiting, store=store, prefill=prefill_tokens
        )
        self._submitted = 0
        self._draining = self._stopping = False
        self._threads = torch.get_num_threads()
        self._thread: threading.Thread | None = None

    # -- from any thread ----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Answer from now on, in a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lofi-engine", daemon=True)
            self._thread.start()

    def submit(self, asked: Asked, on_piece: OnPiece) -> Ticket:
        """Ask; on_piece gets the answer in pieces, in the engine's thread.

        Raises  RequestError, UnknownAdapter, Overloaded or Draining at once; nothing was asked then
        """
        check(asked, context=self.context, vocabulary=self.vocabulary)
        self._check_adapter(asked.adapter)
        with self._waiting.changed:
            self._check_open()
            self._submitted += 1
            ticket = Ticket(self._submitted, asked, on_piece, now=time.monotonic(), wake=self._waiting.wake)
            self._check_size(ticket)
            self._waiting.put(ticket)
        return ticket

    def stats(self) -> Stats:
        """The engine at this moment."""
        places, counters = self._scheduler.places, self._scheduler.counters
        return Stats(
            running=places.live,
            waiting=len(self._waiting),
            rows=self.rows,
            queue=self.queue,
            cache_tokens=sum(row.length for row in places.rows),
            cache_capacity=places.cache.tokens,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            finished=dict(counters.finished),
            tokens_per_second=counters.tokens_per_second,
            draining=self._draining,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new request and answer those that were taken; whether all of them ended within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._waiting.changed:
            self._draining = True
            return self._waiting.changed.wait_for(
                lambda: not self._busy, None if end is None else max(0.0, end - time.monotonic())
            )

    def stop(self) -> None:
        """End what still runs with an error, and the thread."""
        with self._waiting.changed:
            self._draining = self._stopping = True
            self._waiting.changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._scheduler.end_all("error", "the server is stopping: ask again when it is back")

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and self.store is None:
            raise UnknownAdapter(f"there is no adapter {name!r}: this engine serves the base alone")
        if name is not None:
            self.store.get(name)

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the server is stopping and takes no new request: ask again when it is back")
        running, waiting = self._scheduler.places.live, len(self._waiting)
        if running + waiting >= self.rows + self.queue:
            seconds = self._scheduler.counters.seconds_each * (1 + waiting / self.rows)
            raise Overloaded(
                f"{running} requests run and {waiting} wait, the most there may be: come back in {seconds:.0f} s",
                min(60.0, max(1.0, seconds)),
            )

    def _check_size(self, ticket: Ticket) -> None:
        cache = self._scheduler.places.cache
        if not cache.fits(1, whole(ticket)):
            raise RequestError(
                f"the request needs up to {whole(ticket)} positions, and the cache holds {cache.tokens}: shorten the "
                "prompt or lower max_tokens"
            )

    # -- the engine's thread ------------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return bool(self._scheduler.places.live or len(self._waiting))

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # a new thread would not have what was set in the one that made us
        while self._wait():
            self.step()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when it is time to stop."""
        with self._waiting.changed:
            if not self._busy:
                self._waiting.changed.notify_all()  # whoever drains
            while not self._busy and not self._stopping:
                self._waiting.changed.wait()
            if self._busy and not self._scheduler.places.live:
                pass
            return not self._stopping

    def step(self) -> None:
        """Admit, read prompts, decode, deliver."""
        scheduler = self._scheduler
        try:
            scheduler.end_overdue()
            scheduler.admit()
            with torch.inference_mode():
                scheduler.prefill()
                scheduler.decode()
        except Exception as error:
            _LOG.exception("a step failed")
            scheduler.end_all("error", f"the engine failed in this step ({type(error).__name__}): ask again")
