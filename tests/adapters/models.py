"""Small models for the adapter tests: odd sizes, biases, in != out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lofi
from lofi.adapters.registry import adapter_tensors


class Toy(nn.Module):
    """An embedding, two linears with bias of different shapes, a norm and a head: nothing from transformers."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.up = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.down = nn.Linear(13, 5)
        self.head = nn.Linear(5, 3)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.norm(self.up(self.embed(ids))))))


def toy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(seed)
    return Toy(dtype)


def ids(seed: int = 1) -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(seed))


def stir(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Give every tensor of an adapter random values, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor) * 0.3)


def adapted(config: lofi.LoraConfig | None = None, *, seed: int = 0, name: str = "default") -> Toy:
    model = toy(seed)
    lofi.add_adapter(model, config or lofi.LoraConfig(r=3, lora_alpha=5), name)
    stir(model, name)
    return model
