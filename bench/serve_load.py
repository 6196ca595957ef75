"""Load: 10,000 requests by 64 clients over HTTP on the loopback while adapters are loaded, unloaded and exchanged.

`lofi serve` as a user starts it, on the model that ships, in float32, so that a batch rounds as a single row does. Four
adapters stay; one comes and goes; under one name two different adapters take turns; all of them share six slots. Before
anything is served, each adapter's greedy answer to each known prompt is computed alone by transformers' `generate`, and
prompts are kept that every adapter answers differently: an answer by the wrong one is seen. Every request must be
answered with exactly the ids of an adapter that its name stood for while it was open; 404 counts as an answer only
where the name was not loaded at some moment of that time, and after a 429 the client comes back. Every fourth answer is
streamed. Latency is a whole answer's, 8 tokens, with 64 waiting clients and the load generator on the same cores.
Memory is the server's anonymous resident memory, sampled every quarter of a second, after a fifth of the requests as
warm-up.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.claim import line
from bench.http_clients import Connection, Refusal
from bench.serve_equal import alone
from bench.served import config, open_model, questions, shipped, write_adapters
from bench.server import TOKEN, Server, serving

REQUESTS, CLIENTS = 10_000, 64
NEW, PROMPTS, LONGEST = 8, 8, 64
STEADY = ("steady-0", "steady-1", "steady-2", "steady-3")
COMES, SWAPS = "comes", "swaps"
FOLDERS = (*STEADY, COMES, "swaps-one", "swaps-two")
ABSENT = "404"
CHANGE_EVERY = 0.25  # seconds
APART = 0.3  # deviation of B: adapters that say different things
SLOTS = 6
WARM_UP = 0.2  # of the requests
SAMPLE_EVERY = 0.25

Ids = tuple[int, ...]
Expected = dict[tuple[str, Ids], Ids]
"""(folder's name or "base", prompt) -> the ids of its greedy answer alone."""


class Timeline:
    """What a name may have stood for, at any time: folders, or nothing."""

    def __init__(self, first: frozenset[str]) -> None:
        self.entries: list[tuple[float, frozenset[str]]] = [(0.0, first)]

    def now(self, *meanings: str) -> None:
        """From here on, the name stands for one of these."""
        self.entries.append((time.perf_counter(), frozenset(meanings)))

    def between(self, start: float, end: float) -> frozenset[str]:
        """Everything it stood for in that time."""
        ends = [at for at, _ in self.entries[1:]] + [float("inf")]
        spans = zip(self.entries, ends, strict=True)
        return frozenset().union(*(meant for (at, meant), until in spans if at <= end and until >= start))


@dataclass
class Counted:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds to the first token of streamed answers."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(share of the requests answered, resident bytes)"""
    changes: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return sum(self.outcomes[kind] for kind in ("right", "404 as it should", "wrong"))

    def fault(self, kind: str, sentence: str) -> None:
        self.outcomes[kind] += 1
        self.faults.append(sentence)


def run(rounds: int | None = None, requests: int = REQUESTS) -> list[dict[str, Any]]:
    """Requests lost, answers of the wrong adapter, memory, and latency."""
    del rounds  # one run
    with tempfile.TemporaryDirectory(prefix="lofi-bench-") as name:
        folders, expected = prepare(Path(name).resolve())
        there = {folder: folders[folder] for folder in (*STEADY, COMES)} | {SWAPS: folders["swaps-one"]}
        more = ("--dtype", "fp32", "--admin-token", TOKEN, "--adapter-folder", name, "--adapter-slots", str(SLOTS))
        with serving(shipped(), there, *more) as server:
            started = time.perf_counter()
            counted = asyncio.run(Load(server, folders, expected, requests).run())
            seconds = time.perf_counter() - started
    return _lines(counted, requests, seconds)


def _lines(counted: Counted, requests: int, seconds: float) -> list[dict[str, Any]]:
    wrong, told = counted.outcomes["wrong"], "; ".join(counted.faults[:3])
    outcomes = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counted.outcomes.items()))
    every = quantiles(counted.seconds)
    return [
        line(f"requests answered, of {requests:,}", counted.answered, goal=f">= {requests}", detail=outcomes),
        line("answers of a wrong adapter", wrong, goal="<= 0", detail=told),
        *memory_lines(counted.memory),
        *(line(f"latency of an answer, p{share}", every[share] * 1e3, unit="ms") for share in (50, 95, 99)),
        line("latency of the first streamed token, p50", quantiles(counted.first)[50] * 1e3, unit="ms"),
        line("requests a second", requests / seconds, detail=f"{counted.changes:,} loads and unloads meanwhile"),
    ]


def memory_lines(samples: list[tuple[float, int]]) -> list[dict[str, Any]]:
    """The last fifth of the run over the first fifth after the warm-up, and the most there ever was after it."""
    early = [size for share, size in samples if WARM_UP <= share < 2 * WARM_UP]
    late = [size for share, size in samples if share >= 1 - WARM_UP]
    most = max(size for share, size in samples if share >= WARM_UP)
    start, end = statistics.mean(early), statistics.mean(late)
    told = f"{start / 1e6:.0f} MB after the warm-up, {end / 1e6:.0f} MB at the end, at most {most / 1e6:.0f} MB"
    return [line("memory at the end over memory after the warm-up", end / start, goal="1 +- 5 %", detail=told)]


def quantiles(values: list[float]) -> dict[int, float]:
    """{1: ..., 99: ...}: the value below which so many percent lie."""
    ordered = sorted(values) or [float("nan")]
    return {share: ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in range(1, 100)}


def prepare(folder: Path) -> tuple[dict[str, Path], Expected]:
    """The adapters' folders, and what each answers to prompts that all of them answer differently.

    Raises  RuntimeError where too few such prompts are found
    """
    from lofi.adapters.switch import set_adapter
    from lofi.files.adapter_folder import load_adapter
    from lofi.serve.request import Asked

    model, _ = open_model(shipped(), "float32")
    made = write_adapters(model, folder, {name: config(n, mixed=True) for n, name in enumerate(FOLDERS)}, APART)
    for number, path in enumerate(made.values()):
        load_adapter(model, path, f"a{number}")
    set_adapter(model, None)
    expected: Expected = {}
    for prompt in dict.fromkeys(ids[-LONGEST:] for ids in questions(4 * PROMPTS)):
        names = {"base": None} | {name: f"a{number}" for number, name in enumerate(FOLDERS)}
        asked = {who: Asked(prompt=prompt, adapter=name, max_tokens=NEW) for who, name in names.items()}
        answers = {who: tuple(alone(model.eval(), one)) for who, one in asked.items()}
        if len(set(answers.values())) == len(answers):
            expected |= {(who, prompt): ids for who, ids in answers.items()}
        if len(expected) == PROMPTS * len(names):
            return made, expected
    raise RuntimeError(f"only {len(expected) // (len(FOLDERS) + 1)} prompts tell all adapters apart, {PROMPTS} wanted")


class Load:
    """The clients, the one who changes adapters, and the one who looks at the memory."""

    def __init__(
        self, server: Server, folders: Mapping[str, Path], expected: Expected, requests: int,
        *, clients: int = CLIENTS, change_every: float = CHANGE_EVERY,
    ) -> None:  # fmt: skip
        self.server, self.folders, self.expected = server, folders, expected
        self.requests, self.clients, self.change_every = requests, clients, change_every
        self.prompts = list(dict.fromkeys(prompt for _, prompt in expected))
        self.base = ""
        self.meaning = {name: Timeline(frozenset([name])) for name in (*STEADY, COMES, "base")}
        self.meaning[SWAPS] = Timeline(frozenset(["swaps-one"]))
        self.counted = Counted()
        self.draw = random.Random(0)
        self.waiting = iter(range(requests))

    async def run(self) -> Counted:
        async with Connection(self.server.port) as first:
            self.base = (await first.ask("/v1/models")).json()["data"][0]["id"]
        others = [asyncio.create_task(self._change()), asyncio.create_task(self._watch())]
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.clients):
                    group.create_task(self._client())
        finally:
            for task in others:
                task.cancel()
        for error in await asyncio.gather(*others, return_exceptions=True):
            if not isinstance(error, asyncio.CancelledError):
                raise RuntimeError("adapters were not changed, or memory not seen, until the end") from error
        return self.counted

    async def _client(self) -> None:
        async with Connection(self.server.port) as connection:
            for number in self.waiting:
                name = self.draw.choice(tuple(self.meaning))
                prompt = self.draw.choice(self.prompts)
                try:
                    await self._ask(connection, number, name, prompt)
                except (OSError, EOFError, TimeoutError, RuntimeError, ValueError) as error:
                    self.counted.fault("lost", f"request {number} was lost: {type(error).__name__} {error}")
                    await connection.close()

    async def _ask(self, connection: Connection, number: int, name: str, prompt: Ids) -> None:
        body = {
            "model": self.base if name == "base" else name, "prompt": list(prompt), "max_tokens": NEW,
            "temperature": 0, "return_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        started = time.perf_counter()
        ids = await self._answer(connection, body, stream=number % 4 == 0)
        ended = time.perf_counter()
        self.counted.seconds.append(ended - started)
        self.judge(number, name, prompt, ids, (started, ended))

    def judge(self, number: int, name: str, prompt: Ids, ids: Ids | None, times: tuple[float, float]) -> None:
        """Count an answer as right only where it is that of an adapter the name stood for; None is a 404."""
        meant = self.meaning[name].between(*times)
        if ids is None:
            if ABSENT in meant:
                self.counted.outcomes["404 as it should"] += 1
            else:
                self.counted.fault("lost", f"request {number} for {name} was answered 404 while it was loaded")
        elif ids in {self.expected[who, prompt] for who in meant if who != ABSENT}:
            self.counted.outcomes["right"] += 1
        else:
            spoke = next((who for (who, p), known in self.expected.items() if p == prompt and known == ids), "nobody")
            self.counted.fault("wrong", f"request {number} for {name} was answered as by {spoke}")

    async def _answer(self, connection: Connection, body: dict[str, Any], *, stream: bool) -> Ids | None:
        """The ids, or None where the adapter is not there; waits and asks again where the server says so."""
        while True:
            try:
                return await (self._streamed if stream else self._whole)(connection, body)
            except Refusal as refusal:
                if refusal.reply.status == 404:
                    return None
                if refusal.reply.status != 429:
                    raise
                await asyncio.sleep(float(refusal.reply.headers.get("retry-after", 1)))

    async def _whole(self, connection: Connection, body: dict[str, Any]) -> Ids:
        reply = await connection.ask("/v1/completions", body)
        if reply.status != 200:
            raise Refusal(reply)
        return tuple(reply.json()["choices"][0]["token_ids"])

    async def _streamed(self, connection: Connection, body: dict[str, Any]) -> Ids | None:
        ids: list[int] = []
        gone, fault, started = False, "", time.perf_counter()
        async for at, event in connection.events("/v1/completions", body | {"stream": True}):
            if "error" in event:
                gone = event["error"].get("code") == "model_not_found"  # unloaded while it waited for its turn
                fault = str(event["error"])
            made = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
            if made and not ids:
                self.counted.first.append(at - started)
            ids += made
        if fault and not gone:
            raise RuntimeError(fault)
        return None if gone else tuple(ids)

    async def _change(self) -> None:
        """Unload and load in turn; while a change is under way the name may mean either."""
        async with Connection(self.server.port, token=TOKEN) as connection:
            for turn in range(10**9):
                await asyncio.sleep(self.change_every)
                one, other = ("swaps-one", "swaps-two") if turn % 2 == 0 else ("swaps-two", "swaps-one")
                await self._exchange(connection, SWAPS, one, other)
                await self._exchange(connection, COMES, COMES, COMES)

    async def _exchange(self, connection: Connection, name: str, before: str, after: str) -> None:
        meaning = self.meaning[name]
        meaning.now(before, ABSENT)
        await self._admin(connection, "unload", {"lora_name": name})
        meaning.now(ABSENT)
        await asyncio.sleep(self.change_every)
        meaning.now(ABSENT, after)
        await self._admin(connection, "load", {"lora_name": name, "lora_path": str(self.folders[after])})
        meaning.now(after)

    async def _admin(self, connection: Connection, what: str, body: dict[str, Any]) -> None:
        reply = await connection.ask(f"/v1/{what}_lora_adapter", body)
        if reply.status != 200:
            raise RuntimeError(f"{what} answered {reply.status}: {reply.body[:300]!r}")
        self.counted.changes += 1

    async def _watch(self) -> None:
        while True:
            done = sum(self.counted.outcomes.values()) / self.requests
            self.counted.memory.append((done, self.server.resident()))
            await asyncio.sleep(SAMPLE_EVERY)
