"""LLM.int8(): a frozen 8-bit linear over the bf16 linear, 2048 to 8192; forward and input gradient, and one row.

Sides: torch's bf16 linear, lofi's Int8Linear and bitsandbytes' Linear8bitLt, threshold 6.0. The rows are normal, so no
column is an outlier.
"""

from __future__ import annotations

from typing import Any

from bench.claim import line
from bench.layers import inference, round_trip, sides
from bench.paired import interleaved


def run(rounds: int = 25) -> list[dict[str, Any]]:
    """Time over the bf16 linear: 1,024 tokens there and back, and one row forward."""
    layers = sides("int8")
    cases = {
        "int8 linear forward + backward over bf16, 1024 tokens": ("<= 1.2", lambda layer: round_trip(layer, 1024)),
        "int8 linear forward + backward over bf16, 256 tokens": (None, lambda layer: round_trip(layer, 256)),
        "int8 linear over bf16, 1 row, inference": (None, lambda layer: inference([layer], 1)),
    }
    rows = []
    for what, (goal, call) in cases.items():
        timing = interleaved({name: call(layer) for name, layer in layers.items()}, rounds=rounds)
        rows.append(
            line(
                what,
                timing.ratio("lofi", "bf16"),
                goal=goal,
                peer=timing.ratio("bitsandbytes", "bf16"),
                times_ms={name: timing.ms(name) for name in layers},
            )
        )
    return rows
