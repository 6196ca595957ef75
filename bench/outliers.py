"""What LLM.int8()'s decomposition is for: seven columns of the activations sixty times as large as the others.

Error of a product (M, O): the mean absolute difference from the float64 product of the same activations with the
dequantized weight, so that only what happens to the activations counts. "Plain" is the same linear with threshold 0.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bench.claim import line

ROWS, IN, OUT, COLUMNS, TIMES = 256, 1024, 768, 7, 60.0


def run(rounds: int = 5) -> list[dict[str, Any]]:
    """Plain row-wise int8's error over the decomposed one's, median over `rounds` draws."""
    draws = [_errors(seed) for seed in range(rounds)]
    ratios = {name: statistics.median(d["plain"] / d[name] for d in draws) for name in ("lofi", "bitsandbytes")}
    first = draws[0]
    return [
        line(
            "planted outliers: error of plain row-wise int8 over the decomposed product's",
            ratios["lofi"],
            goal=">= 15",
            peer=ratios["bitsandbytes"],
            detail=", ".join(f"{name} {error:.2e}" for name, error in first.items()),
        )
    ]


def _errors(seed: int) -> dict[str, float]:
    from bitsandbytes.nn import Int8Params, Linear8bitLt
    from torch import nn

    from lofi.quant.config import Int8Options
    from lofi.quant.linear import Int8Linear

    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    x = torch.randn(ROWS, IN)
    x[:, torch.randperm(IN)[:COLUMNS]] *= TIMES
    float32 = {"compute_dtype": "float32"}
    ours = {
        "lofi": Int8Linear.from_dense(linear, Int8Options(threshold=6.0, **float32)),
        "plain": Int8Linear.from_dense(linear, Int8Options(threshold=0.0, **float32)),
    }
    truth = x.double() @ ours["lofi"].dense_weight(torch.float32).double().t()
    theirs = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    sides = ours | {"bitsandbytes": theirs.to("cpu").eval()}
    with torch.inference_mode():
        return {name: (layer(x).double() - truth).abs().mean().item() for name, layer in sides.items()}
