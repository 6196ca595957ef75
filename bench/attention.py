"""Where plain attention stops being faster than torch's fused kernel in training on this machine.

Forward and backward of one attention, (N, H, T, K) with N T = 2,048 tokens, causal, the way transformers calls either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.claim import line
from bench.paired import paired

HEADS, SIZE, TOKENS = 8, 64, 2048


def run(rounds: int = 15) -> list[dict[str, Any]]:
    """Fused over plain, by row length and dtype; above 1 the plain products are faster."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in (64, 128, 256, 512, 1024, 2048):
            ratio = paired(_step(_fused, length, dtype), _step(_plain, length, dtype), rounds=rounds, warm_up=2)
            what = f"fused / plain attention, forward + backward, {str(dtype)[6:]}, rows of {length}"
            rows.append(line(what, ratio, times_ms={"fused": ratio.a_ms, "plain": ratio.b_ms}))
    return rows


def _step(attend: Callable[..., torch.Tensor], length: int, dtype: torch.dtype) -> Callable[[], object]:
    torch.manual_seed(0)
    shape = (TOKENS // length, HEADS, length, SIZE)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.full((1, 1, length, length), float("-inf"), dtype=dtype).triu(1)
    return lambda: attend(q, k, v, mask).sum().backward()


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * SIZE**-0.5 + mask  # (N, H, T, T)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
