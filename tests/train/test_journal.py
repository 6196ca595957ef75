"""metrics.jsonl: every figure once, also after a kill in the middle of a line."""

from __future__ import annotations

import json
from types import SimpleNamespace

from lofi.files.lines import read_json_lines
from lofi.train.journal import Journal


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, epoch=step / 10)


def test_lines_after_the_resumed_step_are_cut_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 1}\n{"step": 10, "loss": 2}\n{"step": 10, "eval_loss": 3}\n{"step": 15, "lo')
    Journal(path, SimpleNamespace(items=0)).on_train_begin(None, state(10), None)
    assert [row["step"] for row in read_json_lines(path)] == [5, 10, 10]
    Journal(path, SimpleNamespace(items=0)).on_train_begin(None, state(0), None)
    assert read_json_lines(path) == []


def test_a_line_holds_the_figures_of_its_step_and_the_tokens_a_second(tmp_path):
    counter = SimpleNamespace(items=100)
    journal = Journal(tmp_path / "metrics.jsonl", counter)
    journal.on_train_begin(None, state(0), None)
    journal.on_step_begin(None, state(0), None)
    counter.items = 160
    journal.on_step_end(None, state(1), None)
    journal.on_log(None, state(1), None, logs={"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-3, "epoch": 0.1})
    journal.on_log(None, state(1), None, logs={"eval_loss": 2.25, "eval_runtime": 9.0, "eval_samples_per_second": 1.0})
    journal.on_log(None, state(1), None, logs={"train_runtime": 3.0, "train_loss": 2.0})
    first, second = read_json_lines(tmp_path / "metrics.jsonl")
    assert first.pop("tokens_per_second") > 0
    assert first == {"step": 1, "epoch": 0.1, "loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 160}
    assert second == {"step": 1, "epoch": 0.1, "eval_loss": 2.25}
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
