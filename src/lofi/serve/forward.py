"""The two forwards of a step: one token of every running row, and a chunk of the prompts that wait to run.

Knows a model, the cache's rows and the bank of adapters; builds ids, positions, masks and the route, each once a
forward. Knows no requests. The prompt's chunk needs no logits, so it goes through the model below its head; a token of
the prompt and one of the answer meet the same modules with as many tokens as the route says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lofi.serve.cache import RowCache, Span
from lofi.serve.masks import Masks

_ALL = slice(None)


class Forward:
    """Runs a model over the rows of a cache."""

    def __init__(self, model: Any, cache: RowCache, bank: Any = None) -> None:
        self.model = model
        self.body = model.base_model
        self.cache = cache
        self.bank = bank
        self.masks = Masks(model)
        self.device = model.device

    def decode(self, tokens: Sequence[int], positions: Sequence[int], slots: Tensor | None) -> Tensor:
        """Logits (n, V) behind one token of each of the first n rows, at its position; slots (n,) int32."""
        given = torch.tensor((tokens, positions), device=self.device)  # (2, n)
        places = given[1]
        into = (torch.arange(len(tokens), device=self.device), _ALL, places)
        self.cache.aim(Span(0, len(tokens), max(positions) + 1, into, None))
        ids = given[0][:, None]  # (n, 1)
        return self._run(self.model, ids, places[:, None], slots).logits[:, -1]

    def prefill(self, first: int, chunks: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int]) -> None:
        """Keys and values of a chunk of tokens (at least one) of each row from `first` on, behind positions `starts`.

        Shorter chunks are filled up with their last token at its own position, which is computed and thrown away.
        """
        width = max(map(len, chunks))
        ids = torch.tensor([[*chunk, *[chunk[-1]] * (width - len(chunk))] for chunk in chunks], device=self.device)
        lengths = torch.tensor([list(map(len, chunks)), list(starts)], device=self.device)[:, :, None]  # (2, p, 1)
        steps = torch.arange(width, device=self.device)  # (T,)
        positions = lengths[1] + torch.minimum(steps, lengths[0] - 1)  # (p, T)
        row, token = (steps < lengths[0]).nonzero(as_tuple=True)  # (M,) each
        end = max(start + len(chunk) for start, chunk in zip(starts, chunks, strict=True))
        into, source = (row + first, _ALL, positions[row, token]), (row, _ALL, token)
        self.cache.aim(Span(first, len(chunks), end, into, source))
        self._run(self.body, ids, positions, self.route(slots, width))

    def route(self, slots: Sequence[int], width: int = 1) -> Tensor | None:
        """The adapters' slots token by token (M,), where each row has `width` tokens; None where no row has one."""
        if all(slot < 0 for slot in slots):
            return None
        return torch.tensor(slots, dtype=torch.int32, device=self.device).repeat_interleave(width)

    def _run(self, module: Any, ids: Tensor, positions: Tensor, slots: Tensor | None) -> Any:
        with self._routed(slots):
            return module(
                input_ids=ids,
                attention_mask=self.masks(positions, self.cache.span.length),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )

    def _routed(self, slots: Tensor | None) -> AbstractContextManager[Any]:
        return nullcontext() if self.bank is None else self.bank.routed(slots)
