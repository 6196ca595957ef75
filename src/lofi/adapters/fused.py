"""The low-rank product: y = x W^T + b + s (drop(x) A^T) B^T, forward and backward in one autograd function.

`reference` is the plain composition and the executable spec; `low_rank_product` returns the same numbers with no
full-size temporary beside the output, the input saved once (the base product and the update share it), and no cast of
whole activations: A and B, small, are cast to the activations' dtype instead. Their gradients come back in their own.

Notation: M rows (N x T), I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Product:
    """How a kind of frozen linear multiplies, as pure functions over the tensors in which it stores its weight.

    forward(x (..., I), bias (O,) | None, *stored) -> (..., O); input_gradient(g (M, O), *stored) -> (M, I).
    `transposed` says that a dense weight is stored (I, O).
    """

    forward: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]
    stored: Callable[[Any], tuple[Tensor, ...]]
    shape: Callable[[Any], tuple[int, int]]
    transposed: bool = False


def _linear_forward(x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    return g @ weight


def _conv1d_forward(x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # (M, I)
    y = torch.addmm(bias, rows, weight) if bias is not None else rows @ weight  # (M, O)
    return y.view(*x.shape[:-1], weight.shape[1])


def _conv1d_input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    return g @ weight.t()


def _weight(module: Any) -> tuple[Tensor, ...]:
    return (module.weight,)


LINEAR = Product(_linear_forward, _linear_input_gradient, _weight, lambda m: tuple(m.weight.shape))
CONV1D = Product(
    _conv1d_forward, _conv1d_input_gradient, _weight, lambda m: tuple(reversed(m.weight.shape)), transposed=True
)


def reference(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, weight: Tensor, *, scale: float, keep: Tensor | None = None
) -> Tensor:
    """The update in plain torch: x W^T + bias + scale ((x * keep) A^T) B^T.   LoRA (arXiv 2106.09685), eq. 3

    Shapes  x (..., I), a (R, I), b (O, R), weight (O, I), keep (..., I): 0 or 1 / (1 - p) -> (..., O)
    """
    dropped = x if keep is None else x * keep
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))


def low_rank_product(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    *stored: Tensor,
    product: Product,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """`reference` for any storage of a frozen weight, fused; second derivatives are not available.

    Shapes  x (..., I), a (R, I), b (O, R), bias (O,) -> (..., O)
    Dtypes  computed in x's dtype (autocast's, inside autocast); gradients of a and b in theirs
    Exact   equal to `reference` up to rounding in x's dtype; gradcheck passes in float64
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, stored = x.to(dtype), tuple(t.to(dtype) if t.is_floating_point() else t for t in stored)
        with torch.autocast(x.device.type, enabled=False):
            return _apply(x, a, b, bias, stored, product, scale, dropout)
    return _apply(x, a, b, bias, stored, product, scale, dropout)


def _apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    stored: tuple[Tensor, ...],
    product: Product,
    scale: float,
    dropout: float,
) -> Tensor:
    mask, share = draw_mask(x, dropout) if dropout else (None, 1.0)
    bias = None if bias is None else bias.to(x.dtype)
    return _LowRankProduct.apply(x, a, b, bias, mask, (scale, 1.0 / share), product, *stored)


def draw_mask(like: Tensor, dropout: float) -> tuple[Tensor, float]:
    """A boolean mask of `like`'s shape, each entry kept independently, and the exact share that is kept.

    On a CPU the generator is what costs: four 16-bit lanes are cut from each 64-bit draw, so the probability is
    rounded to 1/65536 and the kept share is returned exact. Draws come from torch's default generator, so seeding and
    checkpointed recomputation reproduce them.
    """
    if like.device.type != "cpu":
        return torch.rand(like.shape, device=like.device, dtype=torch.float32) >= dropout, 1.0 - dropout
    threshold = min(round(dropout * 65536), 65535)
    draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # every bit uniform
    lanes = draws.view(torch.int16)[: like.numel()]
    return (lanes >= threshold - 32768).view(like.shape), 1.0 - threshold / 65536


class _LowRankProduct(torch.autograd.Function):
    """forward: y += s h B^T in place; backward: dx = g W + s (g B) A, dA = s (g B)^T x, dB = s g^T h."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scales: tuple[float, float],
        product: Product,
        *stored: Tensor,
    ) -> Tensor:
        scale, gain = scales
        y = product.forward(x, bias, *stored)  # (..., O)
        h = _masked(x, mask) @ a.to(x.dtype).t()  # (M, R)
        h = h if mask is None else h.mul_(gain)  # 1 / (1 - p) here, where it costs R and not I a row
        y.view(-1, y.shape[-1]).addmm_(h, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, a, b, h, mask, *stored)
        ctx.scale, ctx.gain, ctx.product, ctx.bias = scale, gain, product, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, a, b, h, mask, *stored = ctx.saved_tensors
        need_x, need_a, need_b, need_bias = ctx.needs_input_grad[:4]
        g = g.reshape(-1, g.shape[-1])  # (M, O)
        gh = g @ (b * ctx.scale).to(g.dtype)  # (M, R)
        gh = gh if mask is None else gh.mul_(ctx.gain)
        ga = (gh.t() @ _masked(x, mask)).to(a.dtype) if need_a else None  # (R, I)
        gb = ((g.t() @ h) * ctx.scale).to(b.dtype) if need_b else None  # (O, R)
        gx = _input_gradient(ctx.product.input_gradient(g, *stored), gh, a, mask, x) if need_x else None
        gbias = g.sum(0) if need_bias and ctx.bias else None
        return gx, ga, gb, gbias, None, None, None, *(None for _ in stored)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # (M, I)
    return rows if mask is None else rows * mask.view_as(rows)


def _input_gradient(gx: Tensor, gh: Tensor, a: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    a = a.to(gh.dtype)
    if mask is None:
        gx.addmm_(gh, a)
    else:
        gx.add_((gh @ a).mul_(mask.view_as(gx)))
    return gx.view(x.shape)
