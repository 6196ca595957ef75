"""`metrics.jsonl`: one JSON object a line, each step's figures exactly once, also across kills and resumes.

A line is written before the checkpoint of its step, so on resume every line after the checkpoint's step is cut off and
written again by the steps that are run again. Rejected: appending blindly (a resumed curve folds back on itself).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lofi.files.atomic import disk_errors, write_text
from lofi.files.lines import read_json_lines

TRAIN_KEYS = ("loss", "grad_norm", "learning_rate")


class Journal(TrainerCallback):
    """Writes the rows; `tokens` counts trained items, the speed is over the time spent in steps."""

    def __init__(self, path: str | Path, counter: Any) -> None:
        self.path = Path(path)
        self.counter = counter  # .items: trained items so far
        self._since = 0
        self._seconds = 0.0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = (
            [row for row in read_json_lines(self.path) if row["step"] <= state.global_step] if state.global_step else []
        )
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._since = self.counter.items

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        if "loss" in (logs or {}):
            self._append(row | {key: logs[key] for key in TRAIN_KEYS if key in logs} | self._speed())
        elif any(key.startswith("eval_") for key in logs or {}):
            figures = {k: v for k, v in logs.items() if k.startswith("eval_") and not k.endswith(_TIMINGS)}
            self._append(row | figures)

    def _speed(self) -> dict[str, Any]:
        tokens, seconds = self.counter.items - self._since, self._seconds
        self._since, self._seconds = self.counter.items, 0.0
        return {"tokens": self.counter.items, "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}

    def _append(self, row: dict[str, Any]) -> None:
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")


_TIMINGS = ("_runtime", "_per_second", "_preparation_time")
