"""LoRA on embeddings: a lookup in A, then B, times the scale the module itself applies to its rows.

Some families scale their rows in the module's own forward (Gemma: sqrt(D)); the update is scaled alike, else it would
be too small by that factor. No dropout: the input is an index. Starts that are taken from a weight (init.py) see W^T,
since B A is (D, V) like it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi.adapters.init import from_start, frozen_weight, is_zero, start_from
from lofi.adapters.surgery import Part, float_sum
from lofi.errors import TargetError


class EmbeddingFactors(Part):
    """A (R, V) and B (D, R) of one embedding W (V, D); the update is s (B A)^T."""

    kind = "embedding"
    rank: int
    scale: float
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, module: nn.Embedding, rank: int, scale: float):
        super().__init__()
        vocabulary, width = module.weight.shape
        device = module.weight.device
        self.rank, self.scale, self.exported_scale = rank, scale, scale
        self.lora_embedding_A = nn.Parameter(torch.empty(rank, vocabulary, device=device, dtype=torch.float32))
        self.lora_embedding_B = nn.Parameter(torch.empty(width, rank, device=device, dtype=torch.float32))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @torch.no_grad()
    def reset(self, init: bool | str) -> None:
        """A zero and B normal, as PEFT starts embeddings; both normal where `init` is False."""
        nn.init.normal_(self.lora_embedding_B)
        if init is False:
            nn.init.normal_(self.lora_embedding_A)
        else:
            nn.init.zeros_(self.lora_embedding_A)

    def reset_from(self, module: nn.Embedding, init: str, exported_scale: float) -> None:
        """Take A and B from the frozen W^T (D, V), as what the update is counted from: see `init.py`."""
        self.exported_scale = exported_scale
        weight = frozen_weight(module, transposed=True)
        start_from(self.lora_embedding_A, self.lora_embedding_B, init, weight, self.scale)
        self.start_A, self.start_B = self.lora_embedding_A.detach().clone(), self.lora_embedding_B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R', V) and B (D, R') whose product times the scale is the update; R' = 2R after a shifted start."""
        return from_start(self.lora_embedding_A, self.lora_embedding_B, self.start_A, self.start_B)

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
        a, b = self._looked_up(ids)  # (N, T, R'), (D, R')
        return row_scale(module, a.to(dtype) @ (b * self.scale).to(dtype).t())

    def _looked_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A[:, ids]^T and B of `factors`, without forming the difference of rows that no id asks for."""
        rows = F.embedding(ids, self.lora_embedding_A.t())
        if self.start_A is None or self.start_B is None:
            return rows, self.lora_embedding_B
        start = F.embedding(ids, self.start_A.t())
        moved = torch.cat([self.lora_embedding_B, self.lora_embedding_B - self.start_B], dim=-1)
        return torch.cat([rows - start, start], dim=-1), moved

    def changes(self) -> list[str]:
        return ["weight"]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        return float_sum(base, self.delta_weight())

    def delta_weight(self) -> Tensor:
        """s (B A)^T (V, D), or s (B A - B0 A0)^T, in float32."""
        a, b = self.factors()
        return (b.detach().float() @ a.detach().float()).t() * self.scale

    def zero_delta(self) -> bool | None:
        return is_zero(self.lora_embedding_A, self.lora_embedding_B, self.start_A, self.start_B)

    def exported(self) -> dict[str, Tensor]:
        if self.start_A is None:
            return super().exported()
        a, b = self.factors()
        return {"lora_embedding_A": a, "lora_embedding_B": b * (self.scale / self.exported_scale)}  # rsLoRA, folded


def row_scale(module: nn.Module, rows: Tensor) -> Tensor:
    """`rows` as the module would return them: times its `embed_scale` where it has one."""
    scale = getattr(module, "embed_scale", None)
    return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
