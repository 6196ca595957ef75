"""LoRA on embeddings: a lookup in A, then B, times the scale the module itself applies to its rows.

Some families scale their rows in the module's own forward (Gemma: sqrt(D)); the update is scaled alike, else it would
be too small by that factor. No dropout: the input is an index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi.adapters.surgery import Part, float_sum
from lofi.errors import TargetError


class EmbeddingFactors(Part):
    """A (R, V) and B (D, R) of one embedding W (V, D); the update is s (B A)^T."""

    kind = "embedding"
    rank: int
    scale: float

    def __init__(self, module: nn.Embedding, rank: int, scale: float):
        super().__init__()
        vocabulary, width = module.weight.shape
        device = module.weight.device
        self.rank, self.scale = rank, scale
        self.lora_embedding_A = nn.Parameter(torch.empty(rank, vocabulary, device=device, dtype=torch.float32))
        self.lora_embedding_B = nn.Parameter(torch.empty(width, rank, device=device, dtype=torch.float32))

    @torch.no_grad()
    def reset(self, init: bool | str) -> None:
        """A zero and B normal, as PEFT starts embeddings; both normal where `init` is False."""
        nn.init.normal_(self.lora_embedding_B)
        if init is False:
            nn.init.normal_(self.lora_embedding_A)
        else:
            nn.init.zeros_(self.lora_embedding_A)

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        (ids,) = (*args, *kwargs.values())
        y = base(ids)  # (N, T, D)
        for part in parts:
            y = y + part.delta(module, ids, y.dtype)
        return y

    def delta(self, module: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """s A[:, ids]^T B^T in the module's units: (N, T) -> (N, T, D)."""
        if int(module.weight.shape[0]) != self.lora_embedding_A.shape[1]:
            raise TargetError(
                f"the embedding now has {module.weight.shape[0]} rows but its adapter was made for "
                f"{self.lora_embedding_A.shape[1]}; resize the embedding before adding the adapter"
            )
        looked_up = F.embedding(ids, self.lora_embedding_A.t()).to(dtype)  # (N, T, R)
        return row_scale(module, (looked_up @ (self.lora_embedding_B * self.scale).to(dtype).t()))

    def changes(self) -> list[str]:
        return ["weight"]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        return float_sum(base, self.delta_weight())

    def delta_weight(self) -> Tensor:
        """s (B A)^T (V, D), in float32."""
        return (self.lora_embedding_B.detach().float() @ self.lora_embedding_A.detach().float()).t() * self.scale

    def zero_delta(self) -> bool | None:
        return not (self.lora_embedding_A.any() and self.lora_embedding_B.any())


def row_scale(module: nn.Module, rows: Tensor) -> Tensor:
    """`rows` as the module would return them: times its `embed_scale` where it has one."""
    scale = getattr(module, "embed_scale", None)
    return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
