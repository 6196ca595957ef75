"""Decoding through a 4-bit linear: a few rows over the bf16 linear, inference, 2048 to 8192.

All sides in `eval()` and `torch.inference_mode()`, where bitsandbytes takes its fused path. Once with one weight used
again and again (the 4-bit one then stays in a cache of 16 MB), and once through eight different weights in turn, as a
model has them, which no cache holds.
"""

from __future__ import annotations

from typing import Any

from bench.claim import line
from bench.layers import inference, sides
from bench.paired import interleaved

GOALS = {1: "<= 0.40", 4: None, 16: "<= 1.0"}
WEIGHTS = {"one weight": 1, "eight weights in turn": 8}


def run(rounds: int = 40) -> list[dict[str, Any]]:
    """Time over the bf16 linear, by rows and by how many weights are used in turn."""
    layers = [sides("nf4", seed) for seed in range(max(WEIGHTS.values()))]
    names = list(layers[0])
    lines = []
    for how, count in WEIGHTS.items():
        for rows, goal in GOALS.items():
            calls = {name: inference([each[name] for each in layers[:count]], rows) for name in names}
            timing = interleaved(calls, rounds=rounds, calls=24 // count, settle=3)
            lines.append(
                line(
                    f"NF4 linear over bf16, {rows} rows, {how}" if rows > 1 else f"NF4 linear over bf16, 1 row, {how}",
                    timing.ratio("lofi", "bf16"),
                    goal=goal,
                    peer=timing.ratio("bitsandbytes", "bf16"),
                    times_ms={name: timing.ms(name) / count for name in names},
                )
            )
    return lines
