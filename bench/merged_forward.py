"""A merged model costs what the base costs; what an unmerged adapter adds."""

from __future__ import annotations

from typing import Any

import torch

import lofi
from bench.checkpoints import SMALL
from bench.claim import line
from bench.paired import Ratio, paired
from lofi.adapters.merge import merge_in_memory

SHAPES = ((1, 1), (1, 128), (4, 256))


def run(rounds: int = 60) -> list[dict[str, Any]]:
    """Forward of merged over base, and of the unmerged adapter over base, r=16 all-linear, bf16 and float32."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        base, adapted = SMALL.model(dtype).eval(), SMALL.model(dtype).eval()
        lofi.add_adapter(adapted, lofi.LoraConfig(r=16, init_lora_weights=False))
        merged = merge_in_memory(adapted)
        for n, t in SHAPES:
            ids = torch.randint(0, 8192, (n, t))
            for what, model in (("merged / base", merged), ("unmerged / base", adapted)):
                ratio = _forward(model, base, ids, rounds)
                name = f"{what}, {str(dtype)[6:]}, {n} x {t} tokens"
                rows.append(line(name, ratio, times_ms={"this": ratio.a_ms, "base": ratio.b_ms}))
    return rows


@torch.inference_mode()
def _forward(model: torch.nn.Module, base: torch.nn.Module, ids: torch.Tensor, rounds: int) -> Ratio:
    return paired(lambda: model(ids, use_cache=False), lambda: base(ids, use_cache=False), rounds=rounds)
