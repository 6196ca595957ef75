"""How long one forward pass takes: with the adapter, with it merged, and without, in one process and in turn.

Knows  a model and the name of its adapter. A quick figure for the table of a study (a few tenths of a second on a small
       model); the careful measurement over shapes and settings is `latency`.
Knows not  records. Rejected  timing generation: its length depends on what a run learned to say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from lofi.errors import TargetError
from lofi.study.latency import interleaved, synchronizer

BATCH, TOKENS, DECODED = 2, 64, 16
BUDGET = 1.5  # seconds for all sides together
MOST_ROUNDS = 25


def forward_times(model: Any, adapter: str | None) -> dict[str, float | None]:
    """Medians in milliseconds: latency_ms, latency_merged_ms (None where the adapter cannot merge), latency_base_ms.

    A batch of 2 random rows of 64 tokens (at most half of the context; an encoder-decoder decodes 16 of them), the same
    for every run. Without an adapter only latency_ms is a figure. "Base" is the model with its adapter switched off.
    """
    from lofi.adapters.switch import adapters_off, using

    sides: dict[str, Callable[[], object]] = {}
    forward = _forward(model)
    if adapter is None:
        sides["latency_ms"] = forward
    else:
        sides["latency_ms"] = _under(lambda: using(model, adapter), forward)
        sides["latency_base_ms"] = _under(lambda: adapters_off(model), forward)
        merged = _merged(model, adapter)
        if merged is not None:
            sides["latency_merged_ms"] = _forward(merged)
    wait = synchronizer(model.device)
    once = sum(times[0] for times in interleaved(sides, rounds=1, warm_up=1, synchronize=wait).values())
    rounds = min(MOST_ROUNDS, max(3, math.floor(BUDGET / max(once, 1e-6))))
    seconds = interleaved(sides, rounds=rounds, warm_up=0, synchronize=wait)
    names = ("latency_ms", "latency_merged_ms", "latency_base_ms")
    return {name: 1e3 * statistics.median(seconds[name]) if name in seconds else None for name in names}


def _under(speaking: Callable[[], Any], forward: Callable[[], object]) -> Callable[[], object]:
    def side() -> object:
        with speaking():
            return forward()

    return side


def _merged(model: Any, adapter: str) -> Any:
    """The model with the adapter merged in, unproved (its answers are not used); None where it cannot be."""
    from lofi.adapters.merge import merge_in_memory
    from lofi.merge.packed import settle

    try:
        merged: Any = merge_in_memory(model, adapter)
    except TargetError:
        return None
    return settle(merged) if hasattr(merged, "hf_quantizer") else merged


def _forward(model: Any) -> Callable[[], object]:
    """One forward pass over seeded random ids (N, T)."""
    import torch

    from lofi.evaluate.batching import is_pair_model
    from lofi.evaluate.generation import context_length

    config = model.config.get_text_config()
    length = min(TOKENS, (context_length(model) or 2 * TOKENS) // 2)  # half the context leaves room for virtual tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (BATCH, length), generator=generator).to(model.device)  # (N, T)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_pair_model(model):
        given["decoder_input_ids"] = ids[:, :DECODED]

    @torch.inference_mode()
    def forward() -> object:
        return model(**given)

    return forward
