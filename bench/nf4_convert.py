"""Converting one 2048 x 8192 weight: bf16 to NF4 with double quantization, and back, bitsandbytes' time over ours.

Both start from bf16 weights. lofi dequantizes into a buffer that it keeps, as its linears do; bitsandbytes can only
return a new tensor on a CPU, so a line with a new tensor on both sides stands beside the claim.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.claim import line
from bench.layers import dense
from bench.paired import Timing, interleaved


def run(rounds: int = 20) -> list[dict[str, Any]]:
    """How many times as long bitsandbytes takes."""
    return [*_dequantize(rounds), _quantize(rounds)]


def _dequantize(rounds: int) -> list[dict[str, Any]]:
    from bitsandbytes import functional

    from lofi.quant.kernels.dispatch import kernels_for
    from lofi.quant.linear import quantize_4bit

    weight = dense().weight
    out = torch.empty_like(weight)
    kernels, stored = kernels_for(weight.device), quantize_4bit(weight)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    calls = {
        "lofi": lambda: kernels.dequantize_blockwise(stored, out),
        "new tensor": lambda: kernels.dequantize_blockwise(stored, torch.empty_like(weight)),
        "bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
    }
    timing = interleaved(calls, rounds=rounds, calls=5, settle=1)
    return [
        _line("NF4 to bf16, bitsandbytes over lofi", timing, "lofi", ">= 8"),
        _line("NF4 to bf16, bitsandbytes over lofi, a new tensor on both sides", timing, "new tensor", None),
    ]


def _quantize(rounds: int) -> dict[str, Any]:
    from bitsandbytes import functional

    from lofi.quant.linear import quantize_4bit

    weight = dense().weight
    calls = {
        "lofi": lambda: quantize_4bit(weight),
        "bitsandbytes": lambda: functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        ),
    }
    timing = interleaved(calls, rounds=rounds, warm_up=1)
    return _line("bf16 to NF4, bitsandbytes over lofi", timing, "lofi", ">= 8")


def _line(what: str, timing: Timing, side: str, goal: str | None) -> dict[str, Any]:
    times = {"lofi": timing.ms(side), "bitsandbytes": timing.ms("bitsandbytes")}
    return line(what, timing.ratio("bitsandbytes", side), goal=goal, peer=1.0, times_ms=times)
