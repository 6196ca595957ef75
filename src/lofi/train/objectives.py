"""What each task minimises: a sum over labelled items, and how many items there are.

Knows  the four tasks; every objective answers `items(labels)` and gives a *sum*, so that the trainer can divide by the
       items of the whole optimizer step: the gradient is then the same however the step is cut into micro-batches.
Not here  the language-model loss itself (`lofi.models.loss`), padding, batching.
Rejected  the mean that transformers' models return: averaging means of unequal batches weighs tokens unequally.

N rows, T tokens, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi.errors import ModelError

IGNORED = -100


class Summed(NamedTuple):
    """A loss summed over its items, and the logits where the objective had to compute them all."""

    loss_sum: Tensor
    logits: Tensor | None


class LanguageModelling:
    """Cross-entropy summed over trained tokens; of a causal row's labels the first is never predicted."""

    def __init__(self, model: nn.Module, *, shifted: bool) -> None:
        from lofi.models.loss import LanguageModelLoss

        self.loss = LanguageModelLoss(model)
        self.shifted = shifted

    def items(self, labels: Tensor) -> Tensor:  # (N, T) -> ()
        predicted = labels[..., 1:] if self.shifted else labels
        return predicted.ne(IGNORED).sum()

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Summed:
        return Summed(self.loss(model, inputs).loss_sum, None)


class Labelling:
    """Cross-entropy over classes, a label per row (N,) or per token (N, T); -100 is not counted."""

    def items(self, labels: Tensor) -> Tensor:
        return labels.ne(IGNORED).sum()

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Summed:
        labels = inputs["labels"]
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits  # (N, C) or (N, T, C)
        flat = logits.flatten(0, -2).float()
        return Summed(F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum"), logits)


class MultiLabelling:
    """Binary cross-entropy summed over rows and classes; labels are 0/1 in (N, C)."""

    def items(self, labels: Tensor) -> Tensor:
        return torch.tensor(labels.numel(), device=labels.device)

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Summed:
        labels = inputs["labels"]
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits  # (N, C)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        return Summed(loss, logits)


Objective = LanguageModelling | Labelling | MultiLabelling


def objective_for(model: nn.Module) -> Objective | None:
    """The objective of a model's task; None where lofi does not know the task (the model's own loss then counts)."""
    task = _task(model)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return LanguageModelling(model, shifted=task == "CAUSAL_LM")
    if task == "SEQ_CLS" and getattr(model.config, "problem_type", None) == "multi_label_classification":
        return MultiLabelling()
    return Labelling() if task in ("SEQ_CLS", "TOKEN_CLS") else None


def _task(model: nn.Module) -> str | None:
    from lofi.models.facts import task_of

    try:
        return task_of(model)
    except ModelError:  # a model without one of the four heads: what its own forward returns is its loss
        return None
