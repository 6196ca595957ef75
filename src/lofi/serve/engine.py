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
from lofi.serve.cache import BLOCK, RowCache
from lofi.serve.forward import Forward
from lofi.serve.probe import prove
from lofi.serve.request import Asked, Draining, OnPiece, Overloaded, Stats, UnknownAdapter, check
from lofi.serve.row import Ticket
from lofi.serve.sampling import Sampler
from lofi.serve.scheduler import Scheduler
from lofi.serve.text import Vocabulary
from lofi.serve.threads import fastest
from lofi.serve.waiting import Waiting
from lofi.train.settings import free_bytes

_LOG = logging.getLogger("lofi.serve")
_IDLE = 0.01
"""Seconds between looks at what waits for a slot while nothing runs."""
_MEMORY_SHARE = 1 / 3
"""Of the free memory, for keys and values."""


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
        cache_tokens the positions of keys and values of all rows together (default: every row at full context, but no
        more than a third of the free memory), prefill_tokens how much of the prompts is read in one step.

        Raises  ModelError or ProofError for a model that the engine cannot serve, RequestError for a size below 1
        """
        _check_sizes(rows=rows, context=context, cache_tokens=cache_tokens, prefill_tokens=prefill_tokens)
        model.eval()
        proved = prove(model)
        self.rows, self.queue, self.store = rows, queue, store
        longest = _longest(model, context)
        tokens = _cache_tokens(model, rows, longest, cache_tokens, proved.bytes_per_token)
        self.context = min(longest or tokens, tokens)  # positions of one request's prompt and answer together, at most
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        forward = Forward(model, RowCache(rows=rows, tokens=tokens), None if store is None else store.bank)
        sampler = Sampler(seats=rows, vocabulary=self.vocabulary, device=model.device)
        self._waiting = Waiting()
        self._scheduler = Scheduler(
            forward, sampler, Vocabulary(tokenizer), self._waiting, store=store, prefill=prefill_tokens
        )
        self._submitted = 0
        self._draining = self._stopping = False
        self._most_threads = self.threads = torch.get_num_threads()
        """How many of torch's threads a step takes: once started, what is fastest, at most those that torch has."""
        self._thread: threading.Thread | None = None

    # -- from any thread ----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Answer from now on, in a thread of its own."""
        if self._thread is None:
            tried = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(tried,), name="lofi-engine", daemon=True)
            self._thread.start()
            tried.wait()

    def submit(self, asked: Asked, on_piece: OnPiece) -> Ticket:
        """Ask; on_piece gets the answer in pieces, in the engine's thread.

        Raises  RequestError, UnknownAdapter, Overloaded or Draining at once; nothing was asked then
        """
        self._check_adapter(asked.adapter)
        check(asked, context=self.context, vocabulary=self.vocabulary)
        with self._waiting.changed:
            self._check_open()
            self._submitted += 1
            ticket = Ticket(self._submitted, asked, on_piece, now=time.monotonic(), wake=self._waiting.wake)
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
            threads=self.threads,
        )

    @property
    def reuse_prefixes(self) -> bool:
        """Whether a prompt may begin with keys and values that another request with the same adapter has computed."""
        return self._scheduler.reuse

    @reuse_prefixes.setter
    def reuse_prefixes(self, value: bool) -> None:
        self._scheduler.reuse = value

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new request and answer those that were taken; whether all of them ended within `timeout` seconds."""
        with self._waiting.changed:
            self._draining = True
            return self._waiting.changed.wait_for(lambda: not (self.alive and self._waiting.unanswered), timeout)

    def stop(self) -> None:
        """End what still runs with an error, and the thread."""
        with self._waiting.changed:
            self._draining = self._stopping = True
            self._waiting.changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._scheduler.end_all("error", "the server is stopping: ask again when it is back")

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and self.store is None:
            raise UnknownAdapter(f"there is no adapter {name!r}: this engine serves the base alone")
        if name is not None:
            self.store.get(name)

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the server is stopping and takes no new request: ask again when it is back")
        waiting = self._waiting.unanswered - self.rows
        if waiting >= self.queue:
            seconds = self._scheduler.counters.seconds_each * (1 + waiting / self.rows)
            raise Overloaded(
                f"{self.rows} requests run and {waiting} wait, the most there may be: come back in {seconds:.0f} s",
                min(60.0, max(1.0, seconds)),
            )

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self, tried: threading.Event) -> None:
        try:  # here, for a thread has threads of its own: what is fastest in another is not here
            self.threads = _threads(self._scheduler.forward, self._most_threads)
        except Exception:
            _LOG.exception("how many threads are fastest could not be tried")
        finally:
            torch.set_num_threads(self.threads)
            tried.set()
        while self._wait():
            if not self.step():
                time.sleep(_IDLE)  # what waits has no slot, and nothing runs that would free one

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when it is time to stop."""
        with self._waiting.changed:
            self._waiting.changed.wait_for(lambda: self._stopping or self._waiting.unanswered)
            return not self._stopping

    def step(self) -> bool:
        """Admit, read prompts, decode and deliver; whether anything runs. For whoever has not started the thread."""
        scheduler = self._scheduler
        try:
            scheduler.end_overdue()
            scheduler.admit()
            with torch.inference_mode():
                scheduler.prefill()
                return scheduler.decode()
        except Exception as error:
            _LOG.exception("a step failed")
            scheduler.end_all("error", f"the engine failed in this step ({type(error).__name__}): ask again")
            return False


def _threads(forward: Forward, most: int) -> int:
    """The threads with which every row of the cache decodes a token fastest; on a device, those that torch has."""
    if forward.device.type != "cpu":
        return most
    rows = [0] * forward.cache.rows

    def step() -> None:
        with torch.inference_mode():
            forward.decode(rows, rows, None)

    torch.set_num_threads(most)
    return fastest(step, most)


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise RequestError(f"{name} is {value}: give at least 1")


def _longest(model: Any, asked: int | None) -> int | None:
    """The most positions of one request: what was asked for, else what the model states."""
    stated = context_length(model)
    if asked is not None and stated is not None and asked > stated:
        raise RequestError(f"context is {asked}, but the model has {stated} positions: give at most those")
    return asked or stated


def _cache_tokens(model: Any, rows: int, longest: int | None, asked: int | None, bytes_each: int) -> int:
    """How many positions of keys and values there may be: asked for, or what the rows need and memory has."""
    if asked is not None:
        return max(1, asked // BLOCK) * BLOCK
    room = int(free_bytes(str(model.device)) * _MEMORY_SHARE) // bytes_each // BLOCK * BLOCK
    wanted = room if longest is None else rows * -(-longest // BLOCK) * BLOCK
    return max(BLOCK, min(room, wanted))
