"""Examples become micro-batches of tensors: packed rows that do not see each other, or rows padded to a similar length.

Packed     several examples in a row, position_ids restart at 0 for each, no attention_mask (transformers then attends
           within each example), and the first label of each is -100, so nothing is predicted across a border
Padded     one example a row, attention_mask, padding on the right (in training; generation pads on the left)
Grouping happens once, from lengths and a seed; tensors are made when a micro-batch is asked for. Labels stay unshifted,
the model shifts. Not known here: which models may be packed (`lofi.models.packing`), epochs. Rejected: a collator that
packs as it goes (the order then depends on the workers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lofi.data.bins import best_fit, by_length, choose_length
from lofi.data.examples import Example
from lofi.data.labels import IGNORED

Row = list[int]  # the examples of one packed row


@dataclass(eq=False)
class MicroBatches(Dataset[dict[str, torch.Tensor]]):
    """Item i is micro-batch i as keyword arguments for the model (int64; multi-label targets float32)."""

    examples: Sequence[Example]
    groups: list[list[Row]]
    """Micro-batches of rows of example indices; a padded row has one."""
    pad_id: int
    packed: bool
    waste: float
    """Share of the tokens of all micro-batches that is padding."""
    n_trained: list[int] = field(default_factory=list)
    """Labels that count in the loss, for each micro-batch."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        rows = [[self.examples[place] for place in row] for row in self.groups[index]]
        return (
            _packed(rows, self.pad_id)
            if self.packed
            else _PADDED[rows[0][0].task]([row[0] for row in rows], self.pad_id)
        )

    def members(self, index: int) -> list[int]:
        """The examples in micro-batch `index`, for messages that name where a batch came from."""
        return [place for row in self.groups[index] for place in row]

    def sizes(self) -> list[int]:
        """Tokens of each micro-batch, padding included."""
        return [_size(self.examples, group, packed=self.packed) for group in self.groups]


def group(
    examples: Sequence[Example],
    *,
    micro_tokens: int,
    pack: bool,
    pad_id: int,
    max_length: int | None = None,
    seed: int = 0,
) -> MicroBatches:
    """Group examples into micro-batches of about `micro_tokens` tokens (never more, but for one example alone).

    pack        rows of several examples (CAUSAL_LM only)
    max_length  upper limit of a packed row; None: micro_tokens. A row is as short as fills well (`bins.choose_length`)
    Raises      ValueError: no examples, packing of another task, several tasks at once
    """
    tasks = {example.task for example in examples}
    if len(tasks) != 1 or micro_tokens < 1:
        raise ValueError(
            f"group takes examples of one task and a positive micro_tokens, got {tasks} and {micro_tokens}"
        )
    if pack and tasks != {"CAUSAL_LM"}:
        raise ValueError(f"only CAUSAL_LM examples can be packed, not {tasks}")
    if pack:
        groups = _packed_groups(examples, micro_tokens, max_length or micro_tokens, seed)
    else:
        sides = [(len(example), example.size - len(example)) for example in examples]
        groups = [[[index] for index in one] for one in by_length(sides, micro_tokens, seed=seed)]
    total = sum(_size(examples, one, packed=pack) for one in groups)
    trained = [sum(examples[place].n_trained for row in one for place in row) for one in groups]
    waste = 1 - sum(example.size for example in examples) / total
    return MicroBatches(examples, groups, pad_id, pack, waste, trained)


def _packed_groups(examples: Sequence[Example], micro_tokens: int, max_length: int, seed: int) -> list[list[Row]]:
    lengths = [len(example) for example in examples]
    length = choose_length(lengths, min(micro_tokens, max_length), seed=seed)
    rows = best_fit(lengths, length, seed=seed)
    step = max(1, micro_tokens // length)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _size(examples: Sequence[Example], rows: list[Row], *, packed: bool) -> int:
    """Tokens of a micro-batch with its padding; encoder and decoder sides are padded apart."""
    if packed:
        return len(rows) * max(sum(len(examples[place]) for place in row) for row in rows)
    encoder = max(len(examples[row[0]]) for row in rows)
    decoder = max(examples[row[0]].size - len(examples[row[0]]) for row in rows)
    return len(rows) * (encoder + decoder)


def _packed(rows: list[list[Example]], pad_id: int) -> dict[str, torch.Tensor]:
    """(N, T) rows of several examples; padding is a segment of its own, so it touches nothing."""
    width = max(sum(len(example) for example in row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)  # (N, T)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)  # (N, T)
    positions = np.empty((len(rows), width), dtype=np.int64)  # (N, T)
    for place, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example)
            ids[place, start:stop] = example.ids_buffer
            labels[place, start:stop] = example.labels_buffer
            labels[place, start] = IGNORED
            positions[place, start:stop] = np.arange(stop - start)
            start = stop
        positions[place, start:] = np.arange(width - start)
    return _tensors(input_ids=ids, position_ids=positions, labels=labels)


def _padded_inputs(examples: list[Example], pad_id: int) -> dict[str, np.ndarray]:
    ids = _filled([example.ids_buffer for example in examples], pad_id)  # (N, T)
    lengths = np.array([len(example) for example in examples])  # (N,)
    mask = np.arange(ids.shape[1])[None, :] < lengths[:, None]  # (N, T)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


def _filled(rows: Sequence[Any], fill: int) -> np.ndarray:
    """Rows of different length as one array, filled on the right."""
    result = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=np.int64)  # (N, T)
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return result


def _padded_tokens(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Causal, tagging and encoder-decoder batches: labels (N, T) or (N, T of the decoder), -100 where padded."""
    labels = _filled([example.labels_buffer for example in examples], IGNORED)
    return _tensors(**_padded_inputs(examples, pad_id), labels=labels)


def _padded_classes(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Classes (N,) int64, or (N, labels) float32 for multi-label."""
    several = isinstance(examples[0].labels, list)
    labels = np.array([example.labels for example in examples], dtype=np.float32 if several else np.int64)
    return _tensors(**_padded_inputs(examples, pad_id), labels=labels)


def _tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


_PADDED = {
    "CAUSAL_LM": _padded_tokens,
    "TOKEN_CLS": _padded_tokens,
    "SEQ_2_SEQ_LM": _padded_tokens,
    "SEQ_CLS": _padded_classes,
}
