"""Generating text, one sequence, greedily: tokens a second of a 1.1B model in NF4 over the same model in bf16.

TinyLlama-1.1B's shape with random weights; a prompt of 16 tokens and 24 new ones by transformers' `generate`, in
`eval()` and `torch.inference_mode()`. Embeddings and head stay in bf16 on every side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.checkpoints import ONE_B, checkpoint
from bench.claim import line
from bench.paired import interleaved
from bench.steps import quantization

PROMPT, NEW = 16, 24


def run(rounds: int = 7) -> list[dict[str, Any]]:
    """Tokens a second over bf16's, the prompt's pass included."""
    from transformers import AutoModelForCausalLM

    import lofi

    with checkpoint(ONE_B) as folder:
        models = {"bf16": lofi.load_model(folder), "lofi": lofi.load_model(folder, quantization="nf4")}
        models["bitsandbytes"] = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantization("nf4")
        )
        timing = interleaved({name: _generate(model) for name, model in models.items()}, rounds=rounds, warm_up=1)
    speeds = ", ".join(f"{name} {NEW / timing.ms(name) * 1e3:.1f} tokens/s" for name in models)
    return [
        line(
            "tokens a second, NF4 over bf16, one sequence, 1.1B shape",
            timing.ratio("bf16", "lofi"),
            goal=">= 1.6",
            peer=timing.ratio("bf16", "bitsandbytes"),
            detail=speeds,
        )
    ]


def _generate(model: Any) -> Callable[[], object]:
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))  # (1, T)
    model.eval()

    @torch.inference_mode()
    def call() -> None:
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW,
            pad_token_id=0,
        )  # fmt: skip
        assert made.shape[1] == PROMPT + NEW

    return call
