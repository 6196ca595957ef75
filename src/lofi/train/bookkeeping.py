"""What the trainer counts beside the Trainer's own state: items, micro-batches, and the sums behind the next log line.

Saved in every checkpoint as `progress`, so that the first line logged after a resume is the one that would have been
logged without it. Knows how to find out, after the fact, which rows a micro-batch was made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback


class Bookkeeping(TrainerCallback):
    """`items` trained so far, `micro` the micro-batch within the current step, `samples` that step's batches."""

    def __init__(self) -> None:
        self.items = 0
        self.micro = 0
        self.skipped = 0
        self.samples: list[Any] = []
        self._step_items = 0
        self._resumed: dict[str, Any] | None = None
        self._trainer: Any = None

    def begin_step(self, samples: list[Any], items: Any) -> None:
        self.micro, self.samples = 0, samples
        self._step_items = int(items) if items is not None else 0

    def skip(self) -> int:
        """Count one more step in a row that the gradient scaler skips."""
        self.skipped += 1
        return self.skipped

    def state(self, trainer: Any) -> dict[str, Any]:
        """What a checkpoint keeps: counters, and the loss summed since the last log."""
        return {
            "items": self.items,
            "tr_loss": trainer._tr_loss.detach().cpu(),
            "last_logged": trainer._globalstep_last_logged,
        }

    def resume(self, state: dict[str, Any], trainer: Any) -> None:
        """Take over a checkpoint's counters now, and its sums when the loop has set its own to zero."""
        self.items = state["items"]
        self._resumed, self._trainer = state, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._resumed is None:
            self.items = 0
            return
        trainer, kept = self._trainer, self._resumed
        trainer._tr_loss = kept["tr_loss"].to(args.device)
        trainer._total_loss_scalar = -float(kept["tr_loss"])  # those steps are not this call's, as the Trainer counts
        trainer._globalstep_last_logged = kept["last_logged"]
        self._resumed = self._trainer = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.items += self._step_items

    def rows(self, loader: Any, step: int, accumulation: int, micros: Iterable[int], names: Any) -> list[str]:
        """What the rows of micro-batches of the step after `step` are called; [] where the order cannot be told.

        The sampler is a function of its seed and the epoch, so the order is drawn once more instead of being recorded.
        """
        batches = getattr(loader, "batch_sampler", None)
        if batches is None or not hasattr(loader, "set_epoch"):
            return []
        each = -(-len(loader) // accumulation)
        loader.set_epoch(step // each)
        order = list(batches)
        first = (step % each) * accumulation
        indices = [i for m in micros if first + m < len(order) for i in order[first + m]]
        return list(names(indices)) if names is not None else [f"row {i}" for i in indices]
