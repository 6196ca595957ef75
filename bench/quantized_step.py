"""A LoRA training step over a quantized base: what it costs over our own bf16 step, and what the peer's costs over it.

Llama shape, dim 1024, 6 layers, feed-forward 2816, vocabulary 8192, random weights; r=16 on every linear, dropout 0, as
`bench/steps.py` describes. Five sides in one run: lofi over bf16, NF4 and int8, and PEFT + bitsandbytes + transformers'
Trainer over NF4 and int8. lofi chooses plain attention for rows this short, the peer has transformers' default.
"""

from __future__ import annotations

from typing import Any

from bench.checkpoints import STEP, checkpoint
from bench.claim import line
from bench.paired import Timing, interleaved
from bench.steps import ours, theirs

SHAPES = ((1, 256), (2, 512))
KINDS = {"nf4": ("QLoRA", "<= 1.15", ">= 1.3"), "int8": ("int8 LoRA", "<= 1.2", ">= 1.5")}


def run(rounds: int = 15) -> list[dict[str, Any]]:
    """Step times over our bf16 step, and the peer's over ours."""
    rows = []
    for shape in SHAPES:
        with checkpoint(STEP) as folder:
            steps = {"lofi bf16": ours(folder, None, shape)}
            for kind in KINDS:
                steps |= {f"lofi {kind}": ours(folder, kind, shape), f"peer {kind}": theirs(folder, kind, shape)}
            timing = interleaved(steps, rounds=rounds, warm_up=2)
        rows += _lines(timing, f"{shape[0]} x {shape[1]} tokens")
    return rows


def _lines(timing: Timing, tokens: str) -> list[dict[str, Any]]:
    rows = []
    for kind, (name, over_bf16, over_ours) in KINDS.items():
        mine, peer = f"lofi {kind}", f"peer {kind}"
        times = {side: timing.ms(side) for side in ("lofi bf16", mine, peer)}
        cost, gain = timing.ratio(mine, "lofi bf16"), timing.ratio(peer, mine)
        theirs_over_bf16 = timing.ratio(peer, "lofi bf16")
        what = f"{name} step over lofi's bf16 LoRA step, {tokens}"
        rows.append(line(what, cost, goal=over_bf16, peer=theirs_over_bf16, times_ms=times))
        what = f"PEFT + bitsandbytes + Trainer over lofi's {name} step, {tokens}"
        rows.append(line(what, gain, goal=over_ours, peer=1.0))
    return rows
