"""Keys and values of the rows that run, one line of positions a row, in one tensor a layer.

Knows where a forward reads and writes (`Span`), and how large it may become. Knows neither requests nor adapters, and
does not know which positions mean anything: garbage behind a row's length is hidden by the masks and overwritten later,
so it only has to stay finite. Rows and positions are traded against each other within one budget: few long rows or
many short ones.
Rejected: pages with a table (a gather of every key in every step, or a kernel of our own for every kind of attention);
transformers' DynamicCache (one length for all rows, and a copy of everything for each new token).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 64
"""Positions by which rows grow."""


class Span(NamedTuple):
    """Where one forward reads and writes; made once a forward, used by every layer."""

    first: int
    rows: int
    length: int
    """It attends to positions [0, length) of rows [first, first + rows)."""
    into: tuple[Tensor, slice, Tensor]
    """(row, all heads, position) that the new keys go to, (M,) each."""
    source: tuple[Tensor, slice, Tensor] | None
    """(row, all heads, token) of the forward that they come from; None: each row's only token."""


class RowLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, H, L, K); the value's K may differ from the key's."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for what the first forward shows, zeroed: what was never written must stay finite."""
        rows, length = self.owner.rows, self.owner.length
        with torch.inference_mode(False):  # written by several threads' worth of modes: plain tensors fit all
            self.keys, self.values = (
                torch.zeros((rows, x.shape[1], length, x.shape[3]), dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (n, H, T, K) where the span says; what the rows may attend to (n, H, L, K)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, rows, length, into, source = self.owner.span
        part = (slice(first, first + rows), slice(None), slice(0, length))
        found = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            store[into] = new[:, :, 0] if source is None else new[source]  # (M, H, K)
            found.append(store[part])
        return found[0], found[1]

    def resized(self, rows: int, length: int) -> None:
        """Another number of rows and positions; what both have is kept."""
        with torch.inference_mode(False):
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros((rows, old.shape[1], length, old.shape[3]))
                keep = (slice(0, min(rows, len(old))), slice(None), slice(0, min(length, old.shape[2])))
                new[keep] = old[keep]
                setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.span.length, 0

    def get_seq_length(self) -> int:
        return self.owner.span.length

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """A transformers cache whose rows have lengths of their own; `aim` says where the next forward reads and writes.

    rows is the most rows there may be, tokens the most positions of all rows together (allocated as a rectangle).
    """

    layers: list[RowLayer]  # type: ignore[assignment]

    def __init__(self, *, rows: int, tokens: int) -> None:
        super().__init__(layers=[])
        self.limit = rows
        self.tokens = tokens
        self.length = min(BLOCK, tokens)
        self.rows = min(rows, tokens // self.length)
        self.span: Span

    @property
    def capacity(self) -> int:
        """Positions allocated now."""
        return self.rows * self.length

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position in all layers; known once a forward has run."""
        stored = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in stored)

    def aim(self, span: Span) -> None:
        """The next forward reads and writes there."""
        self.span = span

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(RowLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def fits(self, rows: int, longest: int) -> bool:
        """Whether so many rows can hold so many positions each within the budget."""
        return rows <= self.limit and rows * _rounded(longest) <= self.tokens

    def reserve(self, rows: int, longest: int) -> None:
        """Make room for so many rows of so many positions (`fits` must hold); the first rows stay, others may go."""
        if rows <= self.rows and longest <= self.length:
            return
        length = _rounded(longest)
        self.rows, self.length = min(self.limit, max(rows, self.tokens // length)), length
        for layer in self.layers:
            layer.resized(self.rows, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Row `target` gets the first positions of row `source`."""
        if source != target:
            for tensor in self._tensors(length):
                tensor[target] = tensor[source]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first positions of two rows."""
        if one != other and length:
            for tensor in self._tensors(length):
                kept = tensor[one].clone()
                tensor[one] = tensor[other]
                tensor[other] = kept

    def wipe(self, row: int) -> None:
        """Zero a row that holds values which are not finite: multiplied by a weight of 0 they would still spread."""
        for tensor in self._tensors(self.length):
            tensor[row] = 0

    def clear(self) -> None:
        """Let go of everything; the next forward makes room anew."""
        self.layers.clear()

    def _tensors(self, length: int) -> list[Tensor]:
        return [tensor[:, :, :length] for layer in self.layers for tensor in (layer.keys, layer.values)]


def _rounded(length: int) -> int:
    return max(1, -(-length // BLOCK)) * BLOCK
