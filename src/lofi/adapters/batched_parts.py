"""What a bank puts on a module: the tensors of every slot stacked, and the additions of a whole batch at once.

One part serves every adapter at its module; a token's slot chooses what is added, by gathers, never by a loop over
adapters. The low-rank products are handed in (batched_product.py), the rest is small and in plain torch. Where a
slot has nothing at a module, nothing is added: its rank is 0, its rows of the other tables are zero, and those have
one row more than there are slots, the last, for tokens without adapter. Trained token rows: batched_rows.py.

Notation: S slots, M tokens of the batch (all rows, one after the other), R the largest rank here, I in, O out, D model,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lofi.adapters.batched_pack import PackedEmbedding, PackedLinear
from lofi.adapters.batched_product import Bound, LowRankProduct
from lofi.adapters.embedding import row_scale
from lofi.adapters.surgery import Part
from lofi.errors import TargetError


class Route:
    """Which slot each token of one forward belongs to."""

    __slots__ = ("_rows", "_safe", "count", "slots", "total")

    def __init__(self, slots: Tensor, total: int) -> None:
        self.slots = slots  # (M,) int32, -1: no adapter
        self.count = slots.numel()
        self.total = total  # S
        self._rows: Tensor | None = None
        self._safe: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(M,) int64: the row of a table with S + 1 rows, the last for tokens without adapter."""
        if self._rows is None:
            self._rows = torch.where(self.slots < 0, self.total, self.slots).long()
        return self._rows

    @property
    def safe(self) -> Tensor:
        """(M,) int64: the slot, 0 for tokens without adapter, whose result must then be masked."""
        if self._safe is None:
            self._safe = self.slots.clamp(min=0).long()
        return self._safe


class Routing:
    """The route of the forward that runs now, where every part of a bank finds it."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens: Route | None = None


class BankPart(Part):
    """What all adapters of a bank hold at one module."""

    def __init__(self, routing: Routing, path: str, slots: int) -> None:
        super().__init__()
        self.routing, self.path, self.total = routing, path, slots
        self.users: set[int] = set()
        self.device = torch.device("cpu")
        self.vocabulary = 0  # V, where the module is an embedding or a head

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return parts[0].added(module, x, base(x))

    def added(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        """The module's output y with what every token's adapter adds to it; y is written to."""
        raise NotImplementedError

    def route(self, tokens: int, y: Tensor) -> Route:
        """The route of this forward, which must say a slot for each of the tokens that the module got."""
        route = self.routing.tokens
        if route is None or route.count != tokens:
            told = 0 if route is None else route.count
            raise TargetError(
                f"{self.path} got {tokens} tokens but the batch says an adapter for {told}: give a slot for every "
                "token that it sees, or merge the adapters that adapt it into the base"
            )
        if y.requires_grad:
            raise TargetError(f"a bank does not train, but {self.path} wants a gradient; use torch.no_grad()")
        return route

    def place(self, slot: int, packed: Any) -> None:
        """Hold one adapter's tensors for `slot`."""
        self.users.add(slot)

    def clear(self, slot: int) -> None:
        """Let go of a slot's tensors."""
        self.users.discard(slot)

    @property
    def bytes(self) -> int:
        """What the stacks take."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))


class _Factors(BankPart):
    """The stacks of a low-rank product, grown to the largest rank that came."""

    def __init__(self, routing: Routing, path: str, slots: int, *, product: LowRankProduct) -> None:
        super().__init__(routing, path, slots)
        self.product = product
        self.a: Any = None
        self.b: Any = None
        self.ranks: Any = None
        self.call: Any = None

    def grow(self, a: Tensor, b: Tensor, dim: int, device: torch.device) -> None:
        """Room for one slot's a, whose dimension `dim` is its rank, and b (R, O) in every slot of the stacks."""
        rank = b.shape[0]
        if self.ranks is None:
            self.ranks = torch.zeros(self.total, dtype=torch.int32, device=device)
        elif self.b.shape[1] >= rank:
            return
        self.a = _widened(self.a, (self.total, *a.shape), dim + 1, a.dtype, device)
        self.b = _widened(self.b, (self.total, *b.shape), 1, b.dtype, device)
        self.call = self.bind()

    def bind(self) -> Bound:
        """The product over the stacks as they are now."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.ranks[slot] = 0

    def multiply(self, x: Tensor, slots: Tensor, y: Tensor) -> None:
        """y += the product of x, in the stacks' dtype."""
        if x.dtype is self.b.dtype and y.dtype is self.b.dtype:
            self.call(x, slots, y)
        else:
            delta = torch.zeros_like(y, dtype=self.b.dtype)
            self.call(x.to(self.b.dtype), slots, delta)
            y += delta


class BankLinear(_Factors):
    """y + (x A_s^T) B_s for each token's slot s; then DoRA's stretch and the trained bias of those that have one.

    Shapes  a (S, R, I), b (S, R, O), stretch and shift (S + 1, O); x (..., I), y (..., O)
    Exact   as the product that was handed in; what DoRA and biases add is rounded as in the ordinary layer
    """

    kind = "linear"
    stretch: Tensor | None = None
    shift: Tensor | None = None

    def added(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        route = self.route(x.numel() // x.shape[-1], y)
        self.multiply(x, route.slots, y)
        if self.stretch is not None:
            whole = y if module.bias is None else y - module.bias.to(y.dtype)
            y.addcmul_(whole, self.stretch[route.rows].to(y.dtype).view_as(y))
        if self.shift is not None:
            y += self.shift[route.rows].to(y.dtype).view_as(y)
        return y

    def bind(self) -> Bound:
        return self.product.prepare(self.a, self.b, self.ranks)

    def place(self, slot: int, packed: PackedLinear) -> None:
        super().place(slot, packed)
        device = self.device
        rank = packed.b.shape[0]
        self.grow(packed.a, packed.b, 0, device)
        self.a[slot, :rank].copy_(packed.a, non_blocking=True)
        self.b[slot, :rank].copy_(packed.b, non_blocking=True)
        self.ranks[slot] = rank
        self.stretch = self._written(self.stretch, slot, packed.stretch, packed.b)
        self.shift = self._written(self.shift, slot, packed.shift, packed.b)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        for table in (self.stretch, self.shift):
            if table is not None:
                table[slot] = 0

    def _written(self, table: Tensor | None, slot: int, row: Tensor | None, like: Tensor) -> Tensor | None:
        if row is None:
            return table
        if table is None:
            table = torch.zeros(self.total + 1, like.shape[1], dtype=like.dtype, device=self.device)
        table[slot].copy_(row, non_blocking=True)
        return table


class BankEmbedding(_Factors):
    """y + A_s[ids] B_s for each token's slot s, in the units of the module's own rows.

    Shapes  a (S, V, R), b (S, R, D); ids (...), y (..., D)
    """

    kind = "embedding"

    def added(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        route = self.route(x.numel(), y)
        looked_up = row_scale(module, self.a[route.safe, x.reshape(-1)])  # (M, R)
        self.multiply(looked_up, route.slots, y)
        return y

    def bind(self) -> Bound:
        """The product with A as the identity: its half is looked up here, and what is left is x B."""
        rank = self.b.shape[1]
        same = torch.eye(rank, dtype=self.b.dtype, device=self.b.device).repeat(self.total, 1, 1)
        return self.product.prepare(same, self.b, self.ranks)

    def place(self, slot: int, packed: PackedEmbedding) -> None:
        super().place(slot, packed)
        rank = packed.b.shape[0]
        self.grow(packed.a, packed.b, 1, self.device)
        self.a[slot, :, :rank].copy_(packed.a, non_blocking=True)
        self.b[slot, :rank].copy_(packed.b, non_blocking=True)
        self.ranks[slot] = rank


def _widened(old: Tensor | None, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    if old is not None:
        made.narrow(dim, 0, old.shape[dim]).copy_(old)
    return made
