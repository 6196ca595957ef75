"""One frozen linear three ways: torch's in bf16, lofi's quantized one, and bitsandbytes' from the same bf16 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

IN, OUT = 2048, 8192


def dense(seed: int = 0) -> nn.Linear:
    """A frozen bf16 linear, weight (O, I) normal with deviation 0.02."""
    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.normal_(std=0.02)
    return linear


def ours(linear: nn.Linear, kind: str) -> nn.Module:
    """lofi's frozen linear, "nf4" with double quantization or "int8"."""
    from lofi.quant.config import Int8Options, NF4Options
    from lofi.quant.linear import Int8Linear, NF4Linear

    if kind == "nf4":
        return NF4Linear.from_dense(linear, NF4Options())
    return Int8Linear.from_dense(linear, Int8Options())


def theirs(linear: nn.Linear, kind: str) -> nn.Module:
    """bitsandbytes' layer, with the same choices."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight = linear.weight.detach().clone()
    layer: Any
    if kind == "nf4":
        layer = Linear4bit(IN, OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    else:
        layer = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def sides(kind: str, seed: int = 0) -> dict[str, nn.Module]:
    """The three of them: "bf16", "lofi" and "bitsandbytes"."""
    linear = dense(seed)
    return {"bf16": linear, "lofi": ours(linear, kind), "bitsandbytes": theirs(linear, kind)}


def round_trip(layer: nn.Module, tokens: int) -> Callable[[], object]:
    """Forward and input gradient of a batch of rows (M, I)."""
    x = torch.randn(tokens, IN, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(tokens, OUT, dtype=torch.bfloat16)
    layer.train()

    def call() -> None:
        x.grad = None
        layer(x).backward(gradient)

    return call


def inference(layers: list[nn.Module], rows: int) -> Callable[[], object]:
    """Forward of a few rows (M, I) through every layer of the list, evaluating, without autograd."""
    x = torch.randn(rows, IN, dtype=torch.bfloat16)
    for layer in layers:
        layer.eval()

    @torch.inference_mode()
    def call() -> None:
        for layer in layers:
            layer(x)

    return call
