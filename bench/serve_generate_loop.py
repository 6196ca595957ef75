"""Serving requests of 8 adapters: tokens a second of the engine over a loop of PEFT's `generate` with `set_adapter`.

The same requests (prompts of 32 tokens, 32 new ones, greedy) of the same adapters, read from the same folders, in the
same dtype. The loop answers one at a time, as it must, in `inference_mode`, with the number of threads that is faster
for it, and with the requests sorted by adapter, so that it switches eight times and no more; in the order in which they
came it is slower, which stands beside for the small model. The engine is asked by 16 clients in the order in which they
came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.claim import line
from bench.engine_clients import ask_all, tokens_of
from bench.paired import interleaved
from bench.serve_throughput import CLIENTS, NEW, ROWS, served, wanted
from bench.served import open_model, store_of

ROUNDS = {"lofi-tiny": 4, "110M": 2}
REQUESTS = {"lofi-tiny": 32, "110M": 16}


def run(rounds: int | None = None) -> list[dict[str, Any]]:
    """The loop's time over the engine's, for both models."""
    return [_line(model, rounds or ROUNDS[model]) for model in ROUNDS]


def _line(model: str, rounds: int) -> dict[str, Any]:
    with served(model) as (folder, adapters):
        asked = wanted(adapters, REQUESTS[model])
        in_order = sorted(asked, key=lambda one: one.adapter)
        peft = peft_model(folder, adapters)
        with engine(folder, adapters) as running:
            sides: dict[str, Callable[[], object]] = {
                "engine": _engine(running, asked),
                **{f"loop, {count} threads": _loop(peft, in_order, count) for count in _threads()},
            }
            if model == "lofi-tiny":  # the other's loops take long enough
                sides["loop as they came"] = _loop(peft, asked, max(_threads()))
            timing = interleaved(sides, rounds=rounds, warm_up=1)
    best = min((side for side in sides if side.startswith("loop,")), key=timing.ms)
    speeds = ", ".join(f"{side} {len(asked) * NEW / timing.ms(side) * 1e3:,.0f} tokens/s" for side in sides)
    what = f"{model}: tokens a second, engine over a loop of PEFT generate calls"
    return line(what, timing.ratio(best, "engine"), goal=">= 5", peer=1.0, detail=f"best: {best}; {speeds}")


def _threads() -> list[int]:
    return sorted({1, torch.get_num_threads()})


def peft_model(folder: Path, adapters: dict[str, Path]) -> Any:
    """The base with every adapter, as PEFT reads them, in the base's dtype."""
    from peft import PeftModel

    model, _ = open_model(folder)
    first, *others = adapters
    made = PeftModel.from_pretrained(model, str(adapters[first]), adapter_name=first)
    for name in others:
        made.load_adapter(str(adapters[name]), adapter_name=name)
    return made.to(model.dtype).eval()


@contextmanager
def engine(folder: Path, adapters: dict[str, Path]) -> Iterator[Any]:
    """A running engine with these adapters."""
    from lofi.serve.engine import Engine

    opened = open_model(folder)
    made = Engine(*opened, store_of(*opened, adapters), rows=ROWS)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def _engine(running: Any, requests: list[Any]) -> Callable[[], object]:
    return lambda: tokens_of(ask_all(running, requests, clients=CLIENTS))


def _loop(model: Any, requests: list[Any], threads: int) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for asked in requests:
                if model.active_adapter != asked.adapter:
                    model.set_adapter(asked.adapter)
                _generate(model, asked.prompt)
        finally:
            torch.set_num_threads(before)

    return call


def _generate(model: Any, prompt: tuple[int, ...]) -> None:
    ids = torch.tensor([prompt])  # (1, T)
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW,
        pad_token_id=0,
    )  # fmt: skip
    if made.shape[1] != len(prompt) + NEW:
        raise RuntimeError(f"generate made {made.shape[1] - len(prompt)} tokens, expected {NEW}")
