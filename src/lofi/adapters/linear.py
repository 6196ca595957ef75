"""LoRA on linear layers of any storage: the part that holds A and B, and the table of what counts as linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters import dora
from lofi.adapters.fused import CONV1D, LINEAR, Product, low_rank_product
from lofi.adapters.init import draw_factors, from_start, frozen_weight, is_zero, start_from
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
    """A (R, I) and B (O, R) of one linear, float32 masters, and the trained copy of its bias where asked for.

    With a shifted start (`init.py`) A0 and B0 are kept beside them, with DoRA (`dora.py`) the magnitude m (O,).
    """

    kind = "linear"
    rank: int
    scale: float
    start_A: Tensor | None
    start_B: Tensor | None
    base_squares: Any
    lora_magnitude_vector: Any

    def __init__(self, module: Any, rank: int, scale: float, *, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        product = product_of(module)
        assert product is not None
        out_features, in_features = product.shape(module)
        device = module.weight.device
        self.rank, self.scale, self.exported_scale = rank, scale, scale
        self.dropout, self.transposed = dropout, product.transposed
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        own_bias: Any = getattr(module, "bias", None)
        train_bias = bias and own_bias is not None
        self.bias = nn.Parameter(own_bias.detach().float().clone()) if train_bias else None
        self.register_parameter("lora_magnitude_vector", None)
        for name in ("start_A", "start_B", "base_squares"):
            self.register_buffer(name, None)

    def reset(self, init: bool | str) -> None:
        """Draw A and B: see `LoraConfig.init_lora_weights`."""
        draw_factors(self.lora_A, self.lora_B, init)

    def reset_from(self, module: Any, init: str, exported_scale: float) -> None:
        """Take A and B from the module's frozen weight, as what the update is counted from: see `init.py`."""
        self.exported_scale = exported_scale
        start_from(self.lora_A, self.lora_B, init, frozen_weight(module, transposed=self.transposed), self.scale)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def add_magnitude(self, module: Any) -> None:
        """Train each row's length from what it is with A and B as they are: see `dora.py`."""
        self.base_squares = dora.row_squares(frozen_weight(module, transposed=self.transposed))
        self.lora_magnitude_vector = nn.Parameter(self._lengths(module))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R', I) and B (O, R') whose product times the scale is the update; R' = 2R after a shifted start."""
        return from_start(self.lora_A, self.lora_B, self.start_A, self.start_B)

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        product = product_of(module)
        assert product is not None
        bias = _bias(module, parts)
        stored = product.stored(module)
        first, *others = sorted(parts, key=lambda part: part.rescales)
        if any(t.requires_grad for t in stored):  # the user trains the base as well: let autograd see every product
            others, y = parts, product.forward(x, None if bias is None else bias.to(x.dtype), *stored)
        elif first.rescales and first.drops:  # the base sees x, the update and its rescaling drop(x)
            others, y = parts, base(x)
        else:
            # lengths before the product: torch.compile's symbol for the scale must not be born inside its subgraph
            stretch = first.stretch(module) if first.rescales else None
            y = first._whole(module, x, bias, first.dropout if first.training else 0.0)
            y = y if stretch is None else y + _stretched(y, bias, stretch)
        for part in others:
            y = y + part.delta(module, x)
        return y

    @property
    def rescales(self) -> bool:
        """Whether this is DoRA."""
        return self.lora_magnitude_vector is not None

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.dropout > 0

    def _whole(self, module: Any, x: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
        """x W0^T + bias + s (drop(x) A^T) B^T, fused: (..., I) -> (..., O)."""
        product: Any = product_of(module)
        stored, (a, b) = product.stored(module), self.factors()
        if any(t.requires_grad for t in stored):
            return product.forward(x, bias, *stored) + self._low_rank(x)
        return low_rank_product(x, a, b, bias, *stored, product=product, scale=self.scale, dropout=dropout)

    def _low_rank(self, x: Tensor) -> Tensor:
        """s (x A^T) B^T, composed plainly: (..., I) -> (..., O)."""
        a, b = self.factors()
        return (x @ a.to(x.dtype).t()) @ (b * self.scale).to(x.dtype).t()

    def stretch(self, module: Any) -> Tensor:
        """DoRA's m / n - 1 (O,)."""
        return dora.stretch(self.lora_magnitude_vector, self._lengths(module))

    @torch.no_grad()
    def _lengths(self, module: Any) -> Tensor:
        """The length of every row of W0 + s B A (O,), from the factors."""
        weight = frozen_weight(module, transposed=self.transposed)
        return dora.row_lengths(weight, self.base_squares, *self.factors(), self.scale)

    def delta(self, module: Any, x: Tensor) -> Tensor:
        """What this part adds to the module's output: (..., I) -> (..., O)."""
        dropped = nn.functional.dropout(x, self.dropout, self.training)
        if not self.rescales:
            return self._low_rank(dropped)
        stretch = self.stretch(module)
        return self._low_rank(dropped) + _stretched(self._whole(module, dropped, None), None, stretch)

    def changes(self) -> list[str]:
        return ["weight"] if self.bias is None else ["weight", "bias"]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        if tensor_name == "bias" and self.bias is not None:
            return self.bias.detach().to(base.dtype)
        delta = self.delta_weight()
        if self.lora_magnitude_vector is not None:
            weight = base.detach().t() if self.transposed else base.detach()
            delta = dora.delta(weight, delta, self.lora_magnitude_vector.detach())
        return float_sum(base, delta.t() if self.transposed else delta)

    def delta_weight(self) -> Tensor:
        """s B A (O, I), or s (B A - B0 A0), in float32 (float64 for float64 factors); DoRA's lengths not counted."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        a, b = self.factors()
        return (b.detach().to(wide) @ a.detach().to(wide)).mul_(self.scale)

    def zero_delta(self) -> bool | None:
        stretched = self.rescales and not torch.equal(self.lora_magnitude_vector, self.base_squares.sqrt())
        return not stretched and is_zero(self.lora_A, self.lora_B, self.start_A, self.start_B)

    def exported(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = dict(self.named_parameters())
        if self.start_A is not None:
            held["lora_A"], held["lora_B"] = self.factors()
            held["lora_B"] = held["lora_B"] * (self.scale / self.exported_scale)  # rsLoRA, folded
        return held

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def _stretched(y: Tensor, bias: Tensor | None, stretch: Tensor) -> Tensor:
    """What DoRA adds to y = x W0^T + bias + s (x A^T) B^T (..., O), for its m / n - 1 (O,)."""
    return (y if bias is None else y - bias.to(y.dtype)) * stretch.to(y.dtype)


def _bias(module: nn.Module, parts: list[LinearFactors]) -> Tensor | None:
    """The frozen bias, or what the active parts trained: their changes add up."""
    frozen: Any = getattr(module, "bias", None)
    trained = [part.bias for part in parts if part.bias is not None]
    if len(trained) <= 1:
        return trained[0] if trained else frozen
    base = frozen.float()
    return base + sum(bias - base for bias in trained)
