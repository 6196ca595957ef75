"""Turning rows into one batch of tensors, for those who hand `LofiTrainer` plain rows.

`lofi train` does not come here: its datasets already give whole micro-batches (`whole_batch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lofi.errors import DataError

IGNORED = -100


def whole_batch(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one micro-batch that the dataset gave."""
    (batch,) = batches
    return batch


class PadRows:
    """Pad rows of unequal length on the right: ids with `pad_id`, mask with 0, labels with -100.

    Shapes  rows of input_ids (t_i,) -> (N, T), T = max t_i; a scalar label per row -> (N,)
    Raises  DataError for a row without input_ids, or with labels of another length than its ids
    """

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [self._complete(row) for row in rows]
        return {name: self._column(name, [row[name] for row in rows]) for name in rows[0]}

    def _complete(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        if "input_ids" not in row:
            raise DataError(f"a training row has the keys {sorted(row)} but no input_ids; give tokenised rows")
        tensors = {name: torch.as_tensor(value) for name, value in row.items() if value is not None}
        tensors.setdefault("attention_mask", torch.ones_like(tensors["input_ids"]))
        return tensors

    def _column(self, name: str, values: list[Tensor]) -> Tensor:
        if values[0].dim() == 0:
            return torch.stack(values)  # (N,)
        if name == "labels" and values[0].is_floating_point():
            return torch.stack(values)  # multi-label, (N, C)
        fill = {"input_ids": self.pad_id, "labels": IGNORED}.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)  # (N, T)
