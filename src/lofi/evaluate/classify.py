"""What a classification model chooses: one label or several a row (SEQ_CLS), or a tag for every labelled token
(TOKEN_CLS).

Knows prepared examples and a transformers model with a classification head. Labels and tags are numbers here; their
names and the figures are the caller's. Rejected: transformers' pipelines (they tokenize again, by other rules).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lofi.errors import RequestError
from lofi.evaluate.batching import fill_token, grouped, padded
from lofi.evaluate.perplexity import IGNORED

Progress = Callable[[int], None] | None


def choose_labels(
    model: Any, examples: Sequence[Any], *, batch_tokens: int = 8192, on_done: Progress = None
) -> list[int]:
    """The most likely label of every example's `input_ids`."""
    chosen = [0] * len(examples)
    for group, logits in _batches(model, examples, batch_tokens, on_done):
        for index, label in zip(group, logits.argmax(-1).tolist(), strict=True):
            chosen[index] = label
    return chosen


def choose_label_sets(
    model: Any, examples: Sequence[Any], *, batch_tokens: int = 8192, threshold: float = 0.5, on_done: Progress = None
) -> list[list[int]]:
    """Every label whose sigmoid exceeds the threshold, 0..1, for each example's `input_ids`."""
    if not 0 < threshold < 1:
        raise RequestError(f"threshold is {threshold}: give a probability between 0 and 1.")
    chosen: list[list[int]] = [[] for _ in examples]
    for group, logits in _batches(model, examples, batch_tokens, on_done):
        for index, row in zip(group, logits.float().sigmoid() > threshold, strict=True):
            chosen[index] = row.nonzero().flatten().tolist()
    return chosen


def choose_tags(
    model: Any, examples: Sequence[Any], *, batch_tokens: int = 8192, on_done: Progress = None
) -> list[list[int]]:
    """The most likely tag at each position of `input_ids` whose label is not -100, in order."""
    chosen: list[list[int]] = [[] for _ in examples]
    for group, logits in _batches(model, examples, batch_tokens, on_done):
        for index, row in zip(group, logits.argmax(-1).tolist(), strict=True):
            labels = examples[index].labels
            chosen[index] = [tag for tag, label in zip(row, labels, strict=False) if label != IGNORED]
    return chosen


def _batches(
    model: Any, examples: Sequence[Any], batch_tokens: int, on_done: Progress
) -> Iterator[tuple[list[int], Tensor]]:
    """Groups of example numbers with their logits: (N, C), or (N, T, C) for tags."""
    from lofi.models.probe import undisturbed

    lengths = [len(example.input_ids) for example in examples]
    if model.config.get_text_config().pad_token_id is None:
        batch_tokens = 1  # decoders find a row's last token by its padding id; without one they take single rows only
    done = 0
    with torch.no_grad(), undisturbed(model):
        for group in grouped(lengths, batch_tokens=batch_tokens):
            ids, mask = padded([examples[i].input_ids for i in group], fill=fill_token(model))
            yield group, model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            done += len(group)
            if on_done is not None:
                on_done(done)
