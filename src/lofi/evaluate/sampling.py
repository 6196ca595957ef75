"""How the next token is chosen where the most likely one is not wanted: temperature, top-k, top-p, own dice a row.

Knows the scores of the next token. Every row draws from its own seeded stream, so what prompt i
says depends on the seed and on i, not on the batch it happened to be in.
Rejected: torch.multinomial on the global stream, which is what `generate(do_sample=True)` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lofi.errors import RequestError

_ROW = 0x9E3779B97F4A7C15  # spreads row numbers over the seeds (2^64 / golden ratio), seed + 1 is not row + 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw the next token from softmax(scores / temperature), cut to the top_k likeliest and to top_p of the mass."""

    temperature: float = 1.0
    """> 0; lower is more certain."""
    top_k: int = 0
    """How many tokens stay in the draw; 0 keeps all."""
    top_p: float = 1.0
    """The least mass, 0..1, that the likeliest tokens left in the draw must reach; 1 keeps all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RequestError(f"temperature is {self.temperature}: it must be above 0; leave sampling out for greedy.")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}: give the number of tokens to keep, or 0 for all.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}: give a share above 0 and at most 1.")


class Dice:
    """A logits processor after which the highest score is a draw: Gumbel's argmax trick, one random stream a row.

    argmax(log p + g), g = -log(-log u), is distributed as p (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030, sec.
    2).
    Shapes  called with ids (N, T) and scores (N, V); N must be the number of rows given
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        self.sampling = sampling
        seeds = [(sampling.seed + (row + 1) * _ROW) % 2**63 for row in rows]
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = narrowed(scores.float() / self.sampling.temperature, self.sampling)  # (N, V)
        noise = torch.stack([torch.empty(kept.shape[-1]).exponential_(generator=stream) for stream in self.streams])
        return kept - noise.log().to(kept.device)


def narrowed(scores: Tensor, sampling: Sampling) -> Tensor:
    """The scores with every token outside top_k and top_p at minus infinity; the likeliest always stays. (N, V)"""
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        mass = ordered.softmax(-1)
        before = mass.cumsum(-1) - mass  # the mass of all likelier tokens
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        scores = scores.masked_fill(cut, float("-inf"))
    return scores
