"""The progress bar: one line on stderr with the step, loss, tokens a second and the time left."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """A rich progress bar while training; where stderr is no terminal, a plain line at each log instead."""

    def __init__(self, counter: Any, console: Any = None) -> None:
        from rich.console import Console

        self.counter = counter  # .items: trained items so far
        self.console = console or Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None
        self._start = (0.0, 0, 0)  # seconds, step, items when this process began
        self._figures = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = (time.perf_counter(), state.global_step, self.counter.items)
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, figures=f"{self._figures} {self._speed()}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        words = [f"{name} {logs[key]:.4f}" for key, name in _SHOWN.items() if key in logs]
        if not words:
            return
        self._figures = " · ".join(words)
        if self._bar is None:
            left = f" · {self._left(state)} left" if "loss" in logs else ""
            self.console.print(
                f"step {state.global_step}/{state.max_steps} · {self._figures} · {self._speed()}{left}", highlight=False
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self) -> str:
        began, _, items = self._start
        return f"{(self.counter.items - items) / max(time.perf_counter() - began, 1e-9):,.0f} tokens/s"

    def _left(self, state: Any) -> str:
        began, step, _ = self._start
        each = (time.perf_counter() - began) / max(state.global_step - step, 1)
        seconds = int(each * (state.max_steps - state.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


_SHOWN = {"loss": "loss", "eval_loss": "validation loss"}


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=False)
