"""Many adapters in one batch: 8 rows of one token through 1 to 8 adapters, over the base alone.

Llama shape: width 512, 4 layers, vocabulary 8192, random weights; LoRA r=8 on the 16 attention projections. One
forward pass in `inference_mode`, no cache, so that nothing but the base's products stands beside the adapters'. "64
loaded" is a bank of 64 adapters of which the rows use eight. The peer is PEFT's `adapter_names` with the same adapters,
read from the same folders; it computes the same logits, which is checked in float32 before anything is timed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import Shape
from bench.claim import line
from bench.paired import Timing, interleaved
from bench.served import ATTENTION, DTYPES, add_random, config, names, write_adapters

SHAPE = Shape(512, 4, 1408, 8, 8, 8192)
ROWS, LOADED, COUNTS = 8, 64, (1, 2, 4, 8)
CALLS = 4
CLOSE = 1e-4  # of the largest logit: float32 sums in another order

Calls = dict[str, Callable[[], object]]


def run(rounds: int = 80, shape: Shape = SHAPE, loaded: int = LOADED) -> list[dict[str, Any]]:
    """Ratios over the base, in float32 and bf16."""
    return [row for dtype in DTYPES for row in _lines(dtype, _sides(shape, DTYPES[dtype], loaded), rounds, loaded)]


def _lines(dtype: str, sides: Calls, rounds: int, loaded: int) -> list[dict[str, Any]]:
    timing = interleaved(sides, rounds=rounds, calls=CALLS)
    many, few = f"{loaded} loaded", "8 adapters"
    rows = [_over_base(dtype, timing, count) for count in COUNTS]
    more = timing.ratio(many, few)
    return [
        *rows,
        line(f"{dtype}: {loaded} adapters loaded, 8 in the batch, over 8 loaded", more, goal="<= 1.03",
             times_ms={many: timing.ms(many), few: timing.ms(few)}),
        line(f"{dtype}: {loaded} adapters loaded, 8 in the batch, over the base", timing.ratio(many, "base")),
        line(f"{dtype}: the bank there, no row adapted, over the base", timing.ratio("no adapter", "base")),
    ]  # fmt: skip


def _over_base(dtype: str, timing: Timing, count: int) -> dict[str, Any]:
    side, peer = _label(count), f"PEFT {count}"
    return line(
        f"{dtype}: 8 rows, {side}, one token, over the base",
        timing.ratio(side, "base"),
        goal="<= 1.15" if count == 8 else None,
        peer=timing.ratio(peer, "base"),
        times_ms={name: timing.ms(name) for name in ("base", side, peer)},
    )


def _label(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)}"


def _sides(shape: Shape, dtype: torch.dtype, loaded: int) -> Calls:
    """Every side is a model of its own with the same weights, except that one bank or PEFT model serves its counts."""
    base = shape.model(dtype).eval()
    ids = torch.randint(3, shape.vocab, (ROWS, 1), generator=torch.Generator().manual_seed(0))  # (N, 1)
    few, many = bank(copy.deepcopy(base), 8), bank(copy.deepcopy(base), loaded)
    peft = peer(copy.deepcopy(base))
    calls: Calls = {"base": _plain(base, ids), "no adapter": _routed(*few, ids, None)}
    for count in COUNTS:
        calls[_label(count)] = _routed(*few, ids, [row % count for row in range(ROWS)])
        calls[f"PEFT {count}"] = _named(peft, ids, [names(ROWS)[row % count] for row in range(ROWS)])
    calls[f"{loaded} loaded"] = _routed(*many, ids, [row * loaded // ROWS for row in range(ROWS)])
    if dtype == torch.float32:
        agree(calls[_label(8)](), calls["PEFT 8"]())
    return calls


def bank(model: Any, slots: int) -> tuple[Any, Any]:
    """(the model, a full bank on it)."""
    from lofi.adapters.attach import unload
    from lofi.adapters.batched import AdapterBank, pack
    from lofi.quant.kernels.dispatch import low_rank_for

    packed = []
    for number, name in enumerate(names(slots)):
        add_random(model, name, number, config(target_modules=list(ATTENTION)))
        packed.append(pack(model, name))
        unload(model, name)
    made = AdapterBank(model, slots=slots, product=low_rank_for(torch.device("cpu")))
    for slot, one in enumerate(packed):
        made.place(one, slot)
    return model, made


def peer(model: Any) -> Any:
    """The first eight of the same adapters on a PEFT model, through folders as lofi saves them."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory(prefix="lofi-bench-") as folder:
        made = write_adapters(model, Path(folder), {n: config(target_modules=list(ATTENTION)) for n in names(ROWS)})
        first, *others = made
        found = PeftModel.from_pretrained(model, str(made[first]), adapter_name=first)
        for name in others:
            found.load_adapter(str(made[name]), adapter_name=name)
    return found.to(next(model.parameters()).dtype).eval()


def agree(ours: Any, theirs: Any) -> None:
    """RuntimeError where two sides' logits differ by more than float32's order of summing."""
    apart, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not apart <= CLOSE * size:
        raise RuntimeError(f"the sides do not compute the same: logits up to {size:.3g} differ by {apart:.3g}")


def _plain(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    @torch.inference_mode()
    def call() -> Any:
        return model(ids, use_cache=False).logits

    return call


def _routed(model: Any, bank: Any, ids: torch.Tensor, route: Sequence[int] | None) -> Callable[[], Any]:
    slots = None if route is None else torch.tensor(route, dtype=torch.int32)  # (M,)

    @torch.inference_mode()
    def call() -> Any:
        with bank.routed(slots):
            return model(ids, use_cache=False).logits

    return call


def _named(model: Any, ids: torch.Tensor, adapters: list[str]) -> Callable[[], Any]:
    @torch.inference_mode()
    def call() -> Any:
        return model(input_ids=ids, use_cache=False, adapter_names=adapters).logits

    return call
