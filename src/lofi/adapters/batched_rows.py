"""What a bank puts on an embedding, and on the head that shares its weight, for adapters that trained token rows.

The rows of all slots stand in one table, found by slot and token id; nothing is as large as the vocabulary.

Notation: S slots, M tokens of the batch, E rows of all slots together, K the most that one slot has, D model,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lofi.adapters.batched_pack import PackedRows
from lofi.adapters.batched_parts import BankPart, Routing
from lofi.adapters.embedding import row_scale


class BankRows(BankPart):
    """The rows that a token's adapter trained in place of the embedding's own.

    Shapes  keys (E,) int64, slot V + token id, ascending; rows (E, D); ids (...), y (..., D)
    Exact   the trained rows in y's dtype, as the ordinary layer gives them
    """

    kind = "rows"
    keys: Tensor
    rows: Tensor

    def __init__(self, routing: Routing, path: str, slots: int) -> None:
        super().__init__(routing, path, slots)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def added(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        route = self.route(x.numel(), y)
        asked = route.slots.long() * module.weight.shape[0] + x.reshape(-1)  # below 0 without adapter
        place = torch.searchsorted(self.keys, asked).clamp_(max=len(self.keys) - 1)
        rows = row_scale(module, self.rows[place].to(y.dtype))  # (M, D)
        trained = (self.keys[place] == asked)[:, None]
        return torch.where(trained, rows, y.view(-1, y.shape[-1])).view_as(y)

    def place(self, slot: int, packed: PackedRows) -> None:
        super().place(slot, packed)
        self.held[slot] = packed.ids.to(self.device), packed.rows.to(self.device)
        self.tabulate()

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.held.pop(slot, None)
        if self.held:
            self.tabulate()

    def tabulate(self) -> None:
        """Put the rows of all slots in one table."""
        held = sorted(self.held.items())
        self.rows = torch.cat([rows for _, (_, rows) in held])
        self.keys = torch.cat([slot * self.vocabulary + ids for slot, (ids, _) in held])


class BankHeadRows(BankRows):
    """The same rows in the head that shares the embedding's weight: the logits of a token's own trained ids.

    Every trained row of every slot is multiplied, as if the vocabulary were E larger, and each token keeps its own.

    Shapes  rows (E, D), ids (E,); where (S + 1, K) token ids, which (S + 1, K) rows, some (S + 1, 1); x (..., D)
    """

    where: Tensor
    which: Tensor
    some: Tensor
    ids: Tensor

    def added(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        route = self.route(x.numel() // x.shape[-1], y)
        bias = None if module.bias is None else module.bias[self.ids].to(x.dtype)
        said = F.linear(x.reshape(-1, x.shape[-1]), self.rows.to(x.dtype), bias)  # (M, E)
        logits, slot = y.view(-1, y.shape[-1]), route.rows
        where = self.where[slot]  # (M, K)
        kept = torch.where(self.some[slot], said.gather(1, self.which[slot]).to(y.dtype), logits.gather(1, where))
        logits.scatter_(1, where, kept)
        return y

    def tabulate(self) -> None:
        """A slot with fewer rows than K repeats its last one: what is written twice is the same."""
        held = sorted(self.held.items())
        most = max(len(ids) for _, (ids, _) in held)
        self.rows = torch.cat([rows for _, (_, rows) in held])
        self.ids = torch.cat([ids for _, (ids, _) in held])
        self.where = torch.zeros(self.total + 1, most, dtype=torch.long, device=self.device)
        self.which, self.some = torch.zeros_like(self.where), torch.zeros_like(self.where[:, :1], dtype=torch.bool)
        first = 0
        for slot, (ids, _) in held:
            own = torch.arange(most, device=self.device).clamp_(max=len(ids) - 1)
            self.where[slot], self.which[slot], self.some[slot] = ids[own], own + first, True
            first += len(ids)
