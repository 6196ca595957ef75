"""LoRA on linear layers of any storage: the part that holds A and B, and the table of what counts as linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.fused import CONV1D, LINEAR, Product, low_rank_product
from lofi.adapters.surgery import Part, float_sum, own_class

PRODUCTS: dict[str, Product] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "transformers.pytorch_utils.Conv1D": CONV1D,  # GPT-2's linear, weight stored (I, O); named, so nothing is imported
}


def product_of(module: nn.Module) -> Product | None:
    """How this module multiplies; None if it is no linear, or a subclass that computes something else.

    A module with another storage of its frozen weight (4-bit, 8-bit) says so itself, in `frozen_product()`.
    """
    cls = own_class(type(module))
    frozen: Any = getattr(module, "frozen_product", None)
    if frozen is not None:
        return frozen()
    for parent in cls.__mro__:
        product = PRODUCTS.get(f"{parent.__module__}.{parent.__qualname__}")
        if product is not None:
            same_forward = getattr(cls, "forward", None) is getattr(parent, "forward", None)
            return product if same_forward and cls.__name__ != "NonDynamicallyQuantizableLinear" else None
    return None


class LinearFactors(Part):
    """A (R, I) and B (O, R) of one linear, float32 masters, and the trained copy of its bias where asked for."""

    kind = "linear"
    rank: int
    scale: float

    def __init__(self, module: Any, rank: int, scale: float, *, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        product = product_of(module)
        assert product is not None
        out_features, in_features = product.shape(module)
        device = module.weight.device
        self.rank, self.scale, self.dropout, self.transposed = rank, scale, dropout, product.transposed
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        own_bias: Any = getattr(module, "bias", None)
        train_bias = bias and own_bias is not None
        self.bias = nn.Parameter(own_bias.detach().float().clone()) if train_bias else None

    def reset(self, init: bool | str) -> None:
        """Draw A and B: see `LoraConfig.init_lora_weights`."""
        draw_factors(self.lora_A, self.lora_B, init)

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        product = product_of(module)
        assert product is not None
        bias = _bias(module, parts)
        stored = product.stored(module)
        first, *others = parts
        if any(t.requires_grad for t in stored):  # the user trains the base as well: let autograd see every product
            others, y = parts, product.forward(x, None if bias is None else bias.to(x.dtype), *stored)
        else:
            dropout = first.dropout if first.training else 0.0
            y = low_rank_product(
                x, first.lora_A, first.lora_B, bias, *stored, product=product, scale=first.scale, dropout=dropout
            )
        for part in others:
            y = y + part.delta(x)
        return y

    def delta(self, x: Tensor) -> Tensor:
        """s (drop(x) A^T) B^T, composed plainly: (..., I) -> (..., O)."""
        dropped = nn.functional.dropout(x, self.dropout, self.training)
        return (dropped @ self.lora_A.to(x.dtype).t()) @ (self.lora_B * self.scale).to(x.dtype).t()

    def changes(self) -> list[str]:
        return ["weight"] if self.bias is None else ["weight", "bias"]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        if tensor_name == "bias" and self.bias is not None:
            return self.bias.detach().to(base.dtype)
        delta = self.delta_weight()
        return float_sum(base, delta.t() if self.transposed else delta)

    def delta_weight(self) -> Tensor:
        """s B A (O, I), in float32 (float64 for float64 factors)."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.detach().to(wide) @ self.lora_A.detach().to(wide)).mul_(self.scale)

    def zero_delta(self) -> bool | None:
        return not (self.lora_B.any() and self.lora_A.any())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def _bias(module: nn.Module, parts: list[LinearFactors]) -> Tensor | None:
    """The frozen bias, or what the active parts trained: their changes add up."""
    frozen: Any = getattr(module, "bias", None)
    trained = [part.bias for part in parts if part.bias is not None]
    if len(trained) <= 1:
        return trained[0] if trained else frozen
    base = frozen.float()
    return base + sum(bias - base for bias in trained)


@torch.no_grad()
def draw_factors(a: Tensor, b: Tensor, init: bool | str) -> None:
    """A (R, I) and B (O, R) at step 0: B is zero, so the adapter changes nothing, unless `init` is False."""
    if init == "gaussian":
        a.normal_(std=1.0 / a.shape[0])
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    else:
        b.zero_()
