"""When to evaluate is the Trainer's affair; what follows is here: save what was judged, stop when enough."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class SaveJudged(TrainerCallback):
    """Saves a checkpoint at each evaluation, so that the best step is always on disk when it becomes the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = state.global_step > 0
        return control


class EarlyStop(TrainerCallback):
    """Stops after `patience` evaluations in a row without a lower validation loss.

    Counts in the state's history, which every checkpoint holds: a resumed run stops where the uninterrupted one does.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.stopped_at: int | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row and row["step"] > 0]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop = True
            self.stopped_at = state.global_step
        return control
