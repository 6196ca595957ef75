"""The headline: a Llama-2-7B shape trains on this machine, QLoRA r=16 on every linear, 1 x 256 tokens.

The folder is already in NF4 with double quantization (random codes, 3.9 GB) and is mapped, not read; gradient
checkpointing; LofiTrainer's own step. The arithmetic bound counts the products of a step alone (forward, recomputation
and input gradient of every linear, forward and input gradient of the head, and LoRA's own) at the speed at which this
machine multiplies 1024 x 2048 by 2048 x 8192 in bf16, measured in the same process between the steps.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import SEVEN_B, TINY, Shape, checkpoint
from bench.claim import line
from bench.probe_memory import Mark, probe
from bench.steps import RANK, ours

SHAPE = (1, 256)
GIGABYTE = 1e9


def run(rounds: int = 3) -> list[dict[str, Any]]:
    """Peak memory of the process, tokens a second, and the share of the bound."""
    with checkpoint(SEVEN_B, nf4=True) as folder, checkpoint(TINY) as tiny:
        found = probe("bench.headline:train", folder, tiny, str(rounds))
    seconds, rate = statistics.median(found.answer["seconds"]), statistics.median(found.answer["rates"])
    tokens = SHAPE[0] * SHAPE[1]
    speed, bound = tokens / seconds, tokens / (operations(SEVEN_B, tokens) / rate)
    told = f"{operations(SEVEN_B, tokens) / 1e12:.1f} TFLOP a step at {rate / 1e12:.2f} TFLOP/s"
    peak = found.peak_anonymous("start", "end") / GIGABYTE
    return [
        line("7B QLoRA, peak resident memory", found.peak_resident / GIGABYTE, goal="<= 8", unit="GB"),
        line("7B QLoRA, peak anonymous memory", peak, unit="GB", detail="without the mapped base"),
        line("7B QLoRA, seconds to open the folder", found.seconds("start", "opened"), unit="s"),
        line("7B QLoRA, tokens a second", speed, detail=f"{seconds:.1f} s a step; the bound is {bound:.1f}: {told}"),
        line("7B QLoRA, share of the arithmetic bound", speed / bound, goal=">= 0.5"),
    ]


def operations(shape: Shape, tokens: int) -> float:
    """Floating-point operations of the products of one checkpointed step: 2 a weight, a token and a pass.

    Linears: forward, recomputation, input gradient. Head: forward, input gradient. A and B: forward, recomputation, and
    twice in the backward pass. Attention's own products are left out.
    """
    head = shape.vocab * shape.dim
    return 2.0 * tokens * (3 * shape.linear_parameters() + 2 * head + 4 * shape.lora_parameters(RANK))


def train(mark: Mark, folder: str, tiny: str, rounds: str) -> dict[str, Any]:
    """In the probe: open the folder and take `rounds` steps after a first one."""
    ours(Path(tiny), "nf4", (1, 8), checkpointing=True)()
    mark("start")
    step = ours(Path(folder), None, SHAPE, checkpointing=True)
    mark("opened")
    step()
    seconds, rates = [], [_rate()]
    for _ in range(int(rounds)):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
        rates.append(_rate())
    mark("end")
    return {"seconds": seconds, "rates": rates}


def _rate() -> float:
    """Operations a second of a bf16 product, the median of ten."""
    x, weight = torch.randn(1024, 2048).bfloat16(), torch.randn(8192, 2048).bfloat16()
    times = []
    for _ in range(12):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - started)
    return 2.0 * x.numel() * len(weight) / statistics.median(times[2:])
