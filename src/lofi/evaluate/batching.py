"""Rows of token ids as rectangles: grouped by length under a token budget, padded on the side that the model needs.

Knows ids and lengths only. Long rows come first, so that what does not fit in memory fails at once and not at the end.
Rejected: a data loader (nothing here is shuffled, repeated or worth a process).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped(lengths: Sequence[int], *, batch_tokens: int, extra: int = 0) -> list[list[int]]:
    """Indices in groups, longest rows first: rows x (longest + extra) <= batch_tokens, or one row alone.

    `extra` is room for tokens still to come.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = groups and (len(groups[-1]) + 1) * (longest + extra) <= batch_tokens
        if not fits:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


def padded(rows: Sequence[Sequence[int]], *, fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """One rectangle of ids and its attention mask: two (N, T) int64 tensors, T the longest row (at least 1)."""
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = 1
    return ids, mask


def is_pair_model(model: Any) -> bool:
    """Whether the model reads with an encoder and writes with a decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def fill_token(model: Any, tokenizer: Any = None) -> int:
    """An id to fill rectangles with: the padding token if there is one; any other is masked out just as well."""
    text_config = model.config.get_text_config()
    choices = [getattr(tokenizer, "pad_token_id", None), getattr(text_config, "pad_token_id", None)]
    return next((int(choice) for choice in choices if choice is not None and choice >= 0), 0)
