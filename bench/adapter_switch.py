"""Switching the adapter of a sequence: giving one slot back, taking another adapter's, writing the row's route.

What an engine does between two steps when a row changes its adapter: `store.release`, `store.lease`, one number into
the route (rows,). All adapters asked for are in slots; 1,000 are held by name, 8 of them in slots. The model is small,
for a thousand proofs of life must be made before anything is timed; a switch does not look at the model. The peer is
PEFT's `set_adapter` on the shape of `batched_adapters` with 8 adapters. What placing an adapter costs that is in no
slot stands apart, on that shape too: from its copy in memory, and from its folder.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.batched_adapters import SHAPE, peer
from bench.checkpoints import Shape
from bench.claim import line
from bench.paired import interleaved
from bench.served import ATTENTION, config, names, open_model, store_of, write_adapters, write_model

SMALL = Shape(64, 1, 176, 4, 4, 8192, tied=True)
SLOTS, HELD = 8, 1000
CALLS = 2000
MICROSECOND = 1e-3  # in milliseconds


def run(rounds: int = 30, held: int = HELD) -> list[dict[str, Any]]:
    """Microseconds a switch with few and with many adapters held, PEFT's beside it, and what placing costs."""
    with tempfile.TemporaryDirectory(prefix="lofi-bench-") as name:
        folder = Path(name)
        few, many = _switches(folder, held)
        quick = interleaved({"few": few, "many": many}, rounds=rounds, calls=CALLS)
        slow = interleaved({"peft": _peft(), **_placing(folder)}, rounds=rounds)
    of_peft = slow.ms("peft") / MICROSECOND
    return [
        line("switching to another adapter, 2 held", quick.ms("few") / MICROSECOND, goal="<= 50", peer=of_peft,
             unit="us", detail="peer: set_adapter, 8 loaded"),
        line(f"switching to another adapter, {held:,} held", quick.ms("many") / MICROSECOND, goal="<= 50", unit="us"),
        line(f"{held:,} held over 2 held", quick.ratio("many", "few")),
        line("placing an adapter from memory into a slot", slow.ms("memory"), unit="ms"),
        line("placing an adapter from its folder into a slot", slow.ms("disk"), unit="ms"),
    ]  # fmt: skip


def _switches(folder: Path, held: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A switch in a store that holds two adapters, and one in a store that holds `held`."""
    at = write_model(SMALL, folder / "small", torch.float32)
    made = write_adapters(open_model(at)[0], folder / "adapters", {name: config() for name in names(2)})
    every = dict(made) | copies(made[names(2)[0]], folder / "many", held - 2)
    stores = [store_of(*open_model(at), folders, slots=SLOTS) for folders in (made, every)]
    return _switch(stores[0], list(made)), _switch(stores[1], list(every)[-SLOTS + 1 :])


def copies(source: Path, folder: Path, count: int) -> dict[str, Path]:
    """`count` adapters that differ from the one at `source` and from each other, in folders of their own."""
    from safetensors.torch import load_file, save_file

    made = {}
    for number in range(count):
        at = folder / f"copy-{number}"
        at.mkdir(parents=True)
        shutil.copy(source / "adapter_config.json", at)
        tensors = load_file(source / "adapter_model.safetensors")
        save_file({key: value * (1 + 1e-3 * (number + 1)) for key, value in tensors.items()},
                  at / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
        made[at.name] = at
    return made


def _switch(store: Any, asked: list[str]) -> Callable[[], object]:
    """One row goes from adapter to adapter; all of them have been in slots before."""
    route = torch.full((16,), -1, dtype=torch.int32)  # (rows,)
    turn = itertools.cycle(asked)
    lease = store.lease(next(turn))

    def call() -> None:
        nonlocal lease
        store.release(lease)
        lease = store.lease(next(turn))
        route[0] = lease.slot

    return call


def _peft() -> Callable[[], object]:
    model = peer(SHAPE.model(torch.float32))
    turn = itertools.cycle(names(8))
    return lambda: model.set_adapter(next(turn))


def _placing(folder: Path) -> Mapping[str, Callable[[], object]]:
    """A store of two slots and three adapters asked for in turn: every lease evicts; host copies kept, or none."""
    at = write_model(SHAPE, folder / "wide", torch.float32)
    model, tokenizer = open_model(at)
    made = write_adapters(
        copy.deepcopy(model), folder / "placed", {name: config(target_modules=list(ATTENTION)) for name in names(3)}
    )
    calls = {}
    for where, room in {"memory": None, "disk": 0}.items():
        more = {} if room is None else {"host_bytes": room}
        store = store_of(copy.deepcopy(model), tokenizer, made, slots=2, **more)
        calls[where] = _switch(store, list(made))
    return calls
