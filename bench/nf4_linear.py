"""Training through a frozen 4-bit linear: forward and input gradient over the bf16 linear's, 2048 to 8192.

Sides: torch's bf16 linear, lofi's NF4Linear and bitsandbytes' Linear4bit, both with double quantization and quantized
from the same bf16 weights.
"""

from __future__ import annotations

from typing import Any

from bench.claim import line
from bench.layers import round_trip, sides
from bench.paired import interleaved

GOALS = {256: "<= 1.25", 1024: "<= 1.12"}


def run(rounds: int = 40) -> list[dict[str, Any]]:
    """Time over the bf16 linear, by tokens."""
    layers, rows = sides("nf4"), []
    for tokens, goal in GOALS.items():
        timing = interleaved({name: round_trip(layer, tokens) for name, layer in layers.items()}, rounds=rounds)
        rows.append(
            line(
                f"NF4 linear forward + backward over bf16, {tokens} tokens",
                timing.ratio("lofi", "bf16"),
                goal=goal,
                peer=timing.ratio("bitsandbytes", "bf16"),
                times_ms={name: timing.ms(name) for name in layers},
            )
        )
    return rows
