"""Cross-entropy over a big vocabulary, a chunk of tokens at a time, with the gradient taken on the way forward.

The loss is a sum, so its gradient with respect to the hidden states is known as soon as a chunk's logits are: it is
kept (T x D) and the logits (T x V) are dropped. Nothing is computed twice. Rejected: recomputing each chunk in the
backward pass (torch.utils.checkpoint), which costs one more product with the head for the same memory.

Knows only a function from hidden states to logits. Does not know where hidden states or labels come from.
Notation: T labelled tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CPU_CHUNK = 16 * 2**20, 128  # bytes of float32 logits (they stay in the cache), fewest tokens worth reading a head for
_GPU_CHUNK = 128 * 2**20, 512  # bigger products, fewer launches


def chunk_length(vocabulary: int, *, on_cpu: bool = True, trained: bool = False) -> int:
    """How many tokens share one chunk: on a CPU 8192 at a vocabulary of 512, 512 at 8k, 128 from 32k on.

    At least twice as many where the head is trained: each chunk then adds to a gradient as large as the head.
    """
    most_bytes, fewest = _CPU_CHUNK if on_cpu else _GPU_CHUNK
    return max(2 * fewest if trained else fewest, most_bytes // (4 * vocabulary))


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], chunk: int
) -> Tensor:
    """Sum over tokens of -log softmax(logits_of(hidden))[target], softmax in float32.

    d/dz = softmax(z) - onehot(target), pushed through `logits_of` chunk by chunk during the forward pass
    Shapes   hidden (T, D), targets (T,) int64 -> scalar float32
    `parameters` are the trainable tensors inside `logits_of`; they get their gradient like any other.
    Exact    equal to the unchunked loss up to the order of summation; no second derivative
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trainable):
        return _sum_only(hidden, targets, logits_of, chunk)
    return _ChunkedCrossEntropy.apply(hidden, targets, logits_of, chunk, *trainable)


def _sum_only(hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = logits_of(h)  # (C, V)
        total += F.cross_entropy(logits.to(total.dtype), y, reduction="sum")
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logits_of: Any, chunk: int, *parameters: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(parameters)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            loss, first, rest = _loss_and_gradients(h, y, logits_of, parameters)
            total += loss
            pieces.append(first)
            sums = [_added(old, new) for old, new in zip(sums, rest, strict=True)]
        ctx.gradients = (torch.cat(pieces), sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss frees its gradients on the first backward; call it again for another")
        first, rest = ctx.gradients
        ctx.gradients = None  # in place below: a head's gradient is as large as the head
        scaled = [None if g is None else g.mul_(upstream) for g in (first, *rest)]
        return scaled[0], None, None, None, *scaled[1:]


def _loss_and_gradients(
    h: Tensor, y: Tensor, logits_of: Any, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    with torch.enable_grad():
        h = h.detach().requires_grad_()  # (C, D)
        logits = logits_of(h)  # (C, V)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits.detach(), dim=-1, dtype=wide)  # (C, V)
    rows = torch.arange(len(y), device=y.device)
    loss = -log_p[rows, y].sum()
    slope = log_p.exp_()
    slope[rows, y] -= 1
    first, *rest = torch.autograd.grad(logits, [h, *parameters], slope.to(logits.dtype), allow_unused=True)
    return loss, first, rest  # None where a parameter took no part: an inactive adapter keeps no gradient


def _added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old.add_(new)
