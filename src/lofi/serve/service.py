"""Service: the one object that the routes and the page talk to: engine, adapters, formats, counts.

Knows who answers to which name and how each is spoken to; knows no HTTP. The base answers to its own name alone: a name
that is neither the model's nor an adapter's is UnknownAdapter with the nearest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import random
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

from lofi.serve.delivery import Answers, Bridge
from lofi.serve.metrics import BASE, Exposition, Meters
from lofi.serve.request import Drawing, Stats, UnknownAdapter
from lofi.serve.spelling import Spelling


@dataclass(frozen=True)
class Speaker:
    """Who answers: the base (adapter None) or an adapter, its text format, and what its tensors hash to."""

    adapter: str | None
    text_format: Any
    key: str | None = None


@dataclass
class Service:
    """Everything that a request needs beside its own body."""

    engine: Any
    tokenizer: Any
    text_format: Any
    """The base's TextFormat."""
    model_name: str
    context: int
    """Positions that a prompt and its answer have together."""
    store: Any = None
    """The AdapterStore; None where only the base is served."""
    defaults: Drawing = field(default_factory=Drawing)
    """How tokens are chosen where a request does not say."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a raw completion."""
    seed: int = 0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.meters = Meters()
        self.exposition = Exposition(self.meters, self.stats, self.states)
        self.spelling = Spelling(self.tokenizer)
        self.active: weakref.WeakSet[Answers] = weakref.WeakSet()
        self.stopping = False
        self._seeds = random.Random(self.seed)
        self._bridge: Bridge | None = None

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return bool(self.engine.alive)

    @property
    def ready(self) -> bool:
        """Whether a new request would be taken."""
        return self.alive and not self.stopping and not self.engine.stats().draining

    def adapters(self) -> list[Any]:
        """The adapters there are, as the store holds them."""
        return [] if self.store is None else list(self.store.held())

    def states(self) -> dict[str, str]:
        """Adapter's name -> device, host or disk."""
        return {held.name: held.state for held in self.adapters()}

    def speaker(self, name: str) -> Speaker:
        """Who answers to `name`.

        Raises  UnknownAdapter naming the nearest
        """
        if name == self.model_name:
            return Speaker(None, self.text_format)
        if self.store is not None:
            with contextlib.suppress(UnknownAdapter):
                held = self.store.get(name)
                return Speaker(name, held.text_format, held.key)
        known = [self.model_name, *self.states()]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"GET /v1/models lists the {len(known)} names here"
        raise UnknownAdapter(f"there is no model {name[:100]!r}: {hint}")

    def next_seed(self) -> int:
        """A seed for a request that brings none; the same server seed gives the same ones in the same order."""
        return self._seeds.getrandbits(62)

    def bridge(self) -> Bridge:
        """The letter box of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge.loop is not loop:
            self._bridge = Bridge(loop)
        return self._bridge

    def stats(self) -> Stats:
        """The engine's state; draining from the moment that the server was told to stop."""
        stats: Stats = self.engine.stats()
        return dataclasses.replace(stats, draining=True) if self.stopping and not stats.draining else stats

    def end_all(self, sentence: str) -> int:
        """End every answer under way with an error; how many. In the loop's thread."""
        active = [answers for answers in list(self.active) if not answers.done]
        for answers in active:
            answers.end("cancelled", sentence)
        return len(active)

    def status(self, *, admin: bool) -> dict[str, Any]:
        """What the page shows."""
        meters, stats = self.meters, self.stats()
        whole = sum(meters.finished.values())
        return {
            "model": self.model_name,
            "uptime": round(time.time() - self.started, 1),
            "draining": stats.draining,
            "engine": dataclasses.asdict(stats),
            "base": {"requests": meters.requests_of(BASE), "tokens": meters.tokens_made[BASE]},
            "adapters": [self._row(held, whole) for held in self.adapters()],
            "requests": list(reversed(meters.requests)),
            "latency": {"first_token_ms": meters.first.percentiles(), "token_ms": meters.token.percentiles()},
            "admin": admin,
            "context": self.context,
        }

    def _row(self, held: Any, whole: int) -> dict[str, Any]:
        requests = self.meters.requests_of(held.name)
        told = {name: getattr(held, name) for name in ("name", "rank", "bytes", "state", "modules", "loaded_at")}
        tokens = self.meters.tokens_made[held.name]
        return told | {"requests": requests, "tokens": tokens, "share": requests / whole if whole else 0.0}


def drawing_of(generation_config: Any) -> Drawing:
    """The choice that a model's generation config states; greedy where it does not sample. Never beams."""
    penalty = getattr(generation_config, "repetition_penalty", None) or 1.0
    if not getattr(generation_config, "do_sample", None):
        return Drawing(repetition_penalty=penalty)
    stated = {name: getattr(generation_config, name, None) for name in ("temperature", "top_p", "top_k")}
    chosen = {"temperature": 1.0} | {name: value for name, value in stated.items() if value is not None}
    return Drawing(repetition_penalty=penalty, **chosen)


def eos_of(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: what the generation config says, else the tokenizer's EOS."""
    stated = getattr(generation_config, "eos_token_id", None)
    stated = tokenizer.eos_token_id if stated is None else stated
    if stated is None:
        return ()
    return tuple(stated) if isinstance(stated, (list, tuple)) else (int(stated),)
