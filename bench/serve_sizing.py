"""How throughput and latency go with the number of clients: 1 to 64 at once over HTTP, streamed, 8 adapters.

`lofi serve` with as many rows as it has by itself, asked on the loopback, where client and server share the machine's
cores; prompts of 32 tokens, 32 new ones, greedy. First token: from sending the request to its first piece; per token:
from the first piece of an answer to its last, over the tokens after the first (a stream is written fifty times a second
at most, so tokens come several at once). What a request and an adapter take in memory stands beside, counted from the
tensors.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.claim import line
from bench.http_clients import Connection
from bench.serve_load import quantiles
from bench.serve_throughput import completion, served, wanted
from bench.served import open_model, store_of
from bench.server import serving

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
SECONDS = {"lofi-tiny": 4.0, "110M": 5.0}
MEGABYTE = 1e6


@dataclass
class Seen:
    """What the clients saw in the measured time."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def run(rounds: int | None = None) -> list[dict[str, Any]]:
    """A line for each number of clients and each model, and memory a row and an adapter; `rounds` shortens a trial."""
    lines: list[dict[str, Any]] = []
    for model, seconds in SECONDS.items():
        with served(model) as (folder, adapters):
            with serving(folder, adapters) as server, asyncio.Runner() as loop:
                for clients in CONCURRENCY:
                    seen, took = loop.run(measure(server.port, list(adapters), clients, 1.0 if rounds else seconds))
                    lines.append(_line(model, clients, seen, took))
            lines += memory(model, folder, adapters)
    return lines


def _line(model: str, clients: int, seen: Seen, took: float) -> dict[str, Any]:
    first, gap = quantiles(seen.first), quantiles(seen.gaps)
    point = {
        "model": model, "clients": clients, "tokens_per_second": seen.tokens / took,
        "first_ms": [first[50] * 1e3, first[95] * 1e3], "token_ms": [gap[50] * 1e3, gap[95] * 1e3],
    }  # fmt: skip
    told = "first token {:.1f} ms, p95 {:.1f}; per token {:.2f} ms, p95 {:.2f}"
    what = f"{model}: tokens a second, {clients} client{'s' * (clients > 1)}"
    return line(what, point["tokens_per_second"], detail=told.format(*point["first_ms"], *point["token_ms"])) | {
        "curve": point
    }


async def measure(port: int, adapters: list[str], clients: int, seconds: float) -> tuple[Seen, float]:
    """Ask for so many seconds after as long a warm-up as a fifth of it; only what falls in between counts."""
    batches = (wanted(adapters, 64, seed=seed) for seed in itertools.count(64 * clients))
    asked = itertools.chain.from_iterable(batches)
    bodies = (completion(one, "", stream=True, return_token_ids=True) for one in asked)
    seen, begin = Seen(), time.perf_counter() + seconds / 5
    end = begin + seconds
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(_client(port, bodies, seen, begin, end))
    return seen, seconds


async def _client(port: int, bodies: Any, seen: Seen, begin: float, end: float) -> None:
    async with Connection(port) as connection:
        while (started := time.perf_counter()) < end:
            first, last, after = 0.0, 0.0, 0
            async for at, event in connection.events("/v1/completions", next(bodies)):
                made = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
                if not made:
                    continue
                if begin <= at < end:
                    seen.tokens += made
                    if not first:
                        seen.first.append(at - started)
                after, first, last = (after + made if first else 0), first or at, at
            if after and begin <= last < end:
                seen.gaps.append((last - first) / after)


def memory(model: str, folder: Path, adapters: dict[str, Path]) -> list[dict[str, Any]]:
    """Bytes of one token's keys and values, and of one adapter in its slot, from the tensors themselves."""
    opened, tokenizer = open_model(folder)
    shape = opened.config
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head * opened.dtype.itemsize
    store = store_of(opened, tokenizer, adapters)
    for name in adapters:
        store.release(store.lease(name))
    slot = store.bank.bytes / store.bank.slots
    base = sum(tensor.nbytes for tensor in opened.parameters())
    return [
        line(f"{model}: keys and values of 1,000 tokens", 1000 * kv / MEGABYTE, unit="MB",
             detail=f"2 x {shape.num_hidden_layers} layers x {shape.num_key_value_heads} heads x {head} x "
                    f"{opened.dtype.itemsize} bytes a token"),
        line(f"{model}: an adapter's slot, r=8 on every linear", slot / MEGABYTE, unit="MB",
             detail=f"the base is {base / MEGABYTE:,.0f} MB"),
    ]  # fmt: skip
