"""Throughput of 16 clients at once, their requests spread over 8 adapters, over the same with the base only.

Each client asks its next request as soon as its answer has ended: prompts of 32 tokens, 32 new ones, greedy, nothing
ends an answer early. The base's side is a server that was given no adapter. Tokens generated a second, the prompts'
passes included: of the engine asked in its own process, and of `lofi serve` over HTTP on the loopback, where client and
server share the machine's cores. Adapters are r=8 on every linear; the large model has 110 million random weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.claim import line
from bench.engine_clients import ask_all, tokens_of
from bench.http_clients import Connection
from bench.paired import Timing, interleaved
from bench.served import LARGE, eight, in_turn, open_model, random_prompts, shipped, store_of, write_model
from bench.server import serving

CLIENTS, ROWS = 16, 16
PROMPT, NEW = 32, 32
VOCABULARY = 8192
ROUNDS = {"lofi-tiny": 8, "110M": 4}
EACH = {"lofi-tiny": 4, "110M": 1}  # requests of one client in a round

Calls = dict[str, Callable[[], object]]


def run(rounds: int | None = None) -> list[dict[str, Any]]:
    """Tokens a second with adapters over those without, for both models, both ways of asking."""
    rows = []
    for model, how_often in ROUNDS.items():
        with served(model) as (folder, adapters):
            requests, count = CLIENTS * EACH[model], rounds or how_often
            with engines(folder, adapters, requests) as sides:
                rows.append(_line(f"{model}, engine", interleaved(sides, rounds=count, warm_up=1), requests))
            with servers(folder, adapters, requests) as sides:
                rows.append(_line(f"{model}, HTTP", interleaved(sides, rounds=count, warm_up=1), requests))
    return rows


def _line(what: str, timing: Timing, requests: int) -> dict[str, Any]:
    speeds = ", ".join(f"{side} {requests * NEW / timing.ms(side) * 1e3:,.0f} tokens/s" for side in timing.seconds)
    ratio = timing.ratio("base", "8 adapters")
    return line(f"{what}: tokens a second, 16 clients, 8 adapters, over the base", ratio, goal=">= 0.85", detail=speeds)


@contextlib.contextmanager
def served(model: str) -> Iterator[tuple[Path, dict[str, Path]]]:
    """The model's folder and eight adapters' while the block runs."""
    with tempfile.TemporaryDirectory(prefix="lofi-bench-") as name:
        folder = shipped() if model == "lofi-tiny" else write_model(LARGE, Path(name) / "model")
        yield folder, eight(open_model(folder)[0], Path(name) / "adapters")


@contextlib.contextmanager
def engines(folder: Path, adapters: dict[str, Path], requests: int) -> Iterator[Calls]:
    """Two engines, one with the adapters and one that has none; whichever is asked works alone."""
    from lofi.serve.engine import Engine

    plain, full = open_model(folder), open_model(folder)
    made = {
        "base": Engine(*plain, rows=ROWS),
        "8 adapters": Engine(*full, store_of(*full, adapters), rows=ROWS),
    }
    who = {"base": (), "8 adapters": tuple(adapters)}
    for engine in made.values():
        engine.start()
    try:
        yield {side: _asking(engine, who[side], requests) for side, engine in made.items()}
    finally:
        for engine in made.values():
            engine.stop()


def wanted(adapters: Sequence[str] | dict[str, Path], count: int, *, seed: int = 0) -> list[Any]:
    """Requests with random prompts, the adapters in turn; of the base where there are none."""
    from lofi.serve.request import Asked

    prompts = random_prompts(count, PROMPT, VOCABULARY, seed=seed)
    who = in_turn(list(adapters) or [None], count)
    return [Asked(prompt=p, adapter=name, max_tokens=NEW) for p, name in zip(prompts, who, strict=True)]


def _asking(engine: Any, adapters: Sequence[str], requests: int) -> Callable[[], object]:
    """Each call asks other prompts, so that no keys and values of the call before can be used again."""
    turn = itertools.count()

    def call() -> None:
        made = tokens_of(ask_all(engine, wanted(adapters, requests, seed=next(turn)), clients=CLIENTS))
        if made != requests * NEW:
            raise RuntimeError(f"{made} tokens came, expected {requests * NEW}")

    return call


@contextlib.contextmanager
def servers(folder: Path, adapters: dict[str, Path], requests: int) -> Iterator[Calls]:
    """Two `lofi serve`, one without adapters, each asked by 16 connections."""
    with serving(folder, {}) as base, serving(folder, adapters) as full, asyncio.Runner() as loop:
        ask = {"base": _Http(loop, base.port, (), requests), "8 adapters": _Http(loop, full.port, adapters, requests)}
        try:
            yield dict(ask)
        finally:
            for side in ask.values():
                side.close()


def completion(asked: Any, base: str, **more: Any) -> dict[str, Any]:
    """The request's body over HTTP."""
    body = {"model": asked.adapter or base, "prompt": list(asked.prompt), "max_tokens": asked.max_tokens}
    return body | {"temperature": 0, "ignore_eos": True} | more


class _Http:
    """Sixteen connections that stay open; a call asks every request and waits for all answers."""

    def __init__(
        self, loop: asyncio.Runner, port: int, adapters: Sequence[str] | dict[str, Path], requests: int
    ) -> None:
        self.loop, self.adapters, self.requests, self.turn = loop, tuple(adapters), requests, itertools.count()
        self.connections = [Connection(port) for _ in range(CLIENTS)]
        self.base = loop.run(self.connections[0].ask("/v1/models")).json()["data"][0]["id"]

    def __call__(self) -> None:
        self.loop.run(self._all())

    async def _all(self) -> None:
        asked = wanted(self.adapters, self.requests, seed=next(self.turn))
        waiting = iter([completion(one, self.base) for one in asked])
        await asyncio.gather(*(self._client(connection, waiting) for connection in self.connections))

    async def _client(self, connection: Connection, waiting: Iterator[dict[str, Any]]) -> None:
        for body in waiting:
            reply = await connection.ask("/v1/completions", body)
            made = reply.json()["usage"]["completion_tokens"] if reply.status == 200 else reply.body[:300]
            if made != NEW:
                raise RuntimeError(f"the server answered {reply.status} with {made} tokens, expected {NEW}")

    def close(self) -> None:
        async def all_of_them() -> None:
            for connection in self.connections:
                await connection.close()

        self.loop.run(all_of_them())
