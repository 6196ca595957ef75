"""What NF4 loses: mean absolute error on normal values of deviation 1, by block size, against the published figures.

The plain-torch quantizer, without double quantization. bitsandbytes publishes the three figures for its own.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.claim import line

PUBLISHED = {64: 0.072798, 256: 0.080337, 4096: 0.092547}
VALUES = 2**22


def run(rounds: int = 4) -> list[dict[str, Any]]:
    """Mean over `rounds` draws of 4 million values."""
    from bitsandbytes import functional

    from lofi.quant.linear import quantize_4bit
    from lofi.quant.nf4 import dequantize_blockwise

    found: dict[int, list[tuple[float, float]]] = {block: [] for block in PUBLISHED}
    for seed in range(rounds):
        values = torch.randn(VALUES, generator=torch.Generator().manual_seed(seed))
        for block, errors in found.items():
            ours = dequantize_blockwise(quantize_4bit(values, block=block, double_quant=False), torch.float32)
            codes, state = functional.quantize_4bit(values, blocksize=block, quant_type="nf4")
            theirs = functional.dequantize_4bit(codes, state)
            errors.append(((ours - values).abs().mean().item(), (theirs - values).abs().mean().item()))
    return [
        line(
            f"NF4 mean absolute error on N(0, 1), block {block}",
            sum(ours for ours, _ in errors) / rounds,
            goal=f"{PUBLISHED[block]} +- 0.5 %",
            peer=sum(theirs for _, theirs in errors) / rounds,
        )
        for block, errors in found.items()
    ]
