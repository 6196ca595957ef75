"""Batches that mix adapters: a model with a bank beside its twin with the same adapters, switched the ordinary way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lofi
from lofi.adapters.batched import AdapterBank, pack
from lofi.adapters.batched_product import PLAIN
from lofi.adapters.registry import adapter_tensors
from lofi.adapters.switch import using
from lofi.adapters.twin import twin


def stir(model: Any, name: str, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * size)


@dataclass
class Mix:
    """A served model, its bank, and the twin that holds the same adapters as ordinary ones named "a0", "a1", ..."""

    model: Any
    bank: AdapterBank
    twin: Any
    packed: list[Any]

    def batch(self, ids: Tensor, slots: Sequence[int]) -> Tensor:
        """Output for rows of ids (N, T), row n with the adapter of slots[n]."""
        route = torch.tensor(list(slots), dtype=torch.int32).repeat_interleave(ids.shape[1])
        with torch.no_grad(), self.bank.routed(route):
            return _out(self.model(ids))

    def alone(self, ids: Tensor, slots: Sequence[int]) -> Tensor:
        """The same, one adapter for the whole batch at a time and each row taken from its own."""
        rows = []
        with torch.no_grad():
            for n, slot in enumerate(slots):
                with using(self.twin, None if slot < 0 else f"a{slot}"):
                    rows.append(_out(self.twin(ids))[n])
        return torch.stack(rows)


def mix(
    model: Any, *configs: lofi.LoraConfig, slots: int | None = None, product: Any = PLAIN, size: float = 0.1
) -> Mix:
    """A bank on `model` that holds stirred adapters of these configs, the first in slot 0."""
    beside = twin(model)
    packed = []
    for n, config in enumerate(configs):
        lofi.add_adapter(beside, config, f"a{n}")
        stir(beside, f"a{n}", n, size)
        packed.append(pack(beside, f"a{n}"))
    bank = AdapterBank(model, slots=slots or max(1, len(configs)), product=product)
    for n, one in enumerate(packed):
        bank.place(one, n)
    return Mix(model, bank, beside, packed)


def close(got: Tensor, wanted: Tensor, share: float = 1e-6) -> bool:
    """Whether no entry is off by more than a share of the largest one."""
    return bool((got - wanted).abs().max() <= share * wanted.abs().max())


def _out(made: Any) -> Tensor:
    return made if isinstance(made, Tensor) else made.logits
