"""Ctrl-C during a run: the first asks for a checkpoint at the next step and an orderly end, the second stops now."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class StopSwitch(TrainerCallback):
    """Set by the first Ctrl-C; the trainer then saves at the end of the step it is in and stops."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control


@contextlib.contextmanager
def listening(switch: StopSwitch) -> Iterator[None]:
    """Let SIGINT set `switch` inside the block; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def first(number: int, frame: Any) -> None:
        switch.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
