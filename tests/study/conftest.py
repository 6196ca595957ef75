"""A random two-layer Llama with lofi-tiny's tokenizer, a few rows, and a study of two methods over them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, lofi_tiny) -> Path:
    """The model's folder (in != out, odd inner size, float32)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=24, intermediate_size=41, num_hidden_layers=2, num_attention_heads=3, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=96, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(lofi_tiny / name, folder / name)
    return folder


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    """Files of prompt and completion: train, test; of text and label: labelled; of plain text: general."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [{"prompt": f"count to {i + 2}", "completion": " ".join(WORDS[: i + 2])} for i in range(8)]
    labelled = [{"text": word, "label": "even" if place % 2 else "odd"} for place, word in enumerate(WORDS)]
    (folder / "general.txt").write_text("It rains.\n\nThe cat\nsleeps.\n\n\n\nNobody came.\n")
    return {
        "train": write_rows(folder / "train.jsonl", pairs),
        "test": write_rows(folder / "test.jsonl", pairs[2:7]),
        "labelled": write_rows(folder / "labelled.jsonl", labelled),
        "general": str(folder / "general.txt"),
    }


@pytest.fixture
def study(tiny, rows):
    """Makes a Study of lora and full over two steps; `grid` and others replace its own, dotted keys its base's."""
    from lofi.study.spec import Study

    def make(grid=None, *, base=None, **more):
        keys = {
            "model": str(tiny), "data.train": rows["train"], "data.test": rows["test"],
            "lora.r": 3, "lora.lora_alpha": 7,
            "train.epochs": None, "train.max_steps": 2, "train.batch_tokens": 64, "train.learning_rate": 0.01,
            "train.save_steps": 1, "train.dtype": "fp32", "train.logging_steps": 1,
        }  # fmt: skip
        given = {"metrics": ["rouge1", "perplexity"], "evaluate": {"rows": 4, "max_new_tokens": 3}}
        grid = grid if grid is not None else {"method": ["full", "lora"]}
        return Study.model_validate({"base": keys | (base or {}), "grid": grid} | given | more)

    return make


@pytest.fixture
def quick():
    """A runner that trains nothing: it writes a record a task, at once; `calls` are the runs that it did, and `fail`
    holds what becomes of some: a sentence, or an exception."""
    import numpy as np

    from lofi.study.record import Measured, RunRecord, write_record

    def run(tasks, said):
        for task in tasks:
            run.calls += [task.name] if task.name != "base" else []
            said(task, "training")
            fault = run.fail.pop(task.name, None)
            if isinstance(fault, BaseException):
                raise fault
            if fault is None:
                counts = np.stack([np.linspace(0.1, 0.9, 4) + (task.seed or 0) / 50, np.ones(4)], 1)
                who = {"name": task.name, "arm": task.arm, "method": task.method, "seed": task.seed}
                measures = {"rouge1": Measured(counts, "mean")}
                figures = {"tokens": 15.0 * task.recipe.train.max_steps, "trainable": 12.0, "train_seconds": 1.0}
                write_record(RunRecord(**who, measures=measures, figures=figures), task.folder)
            yield task, fault

    run.calls, run.fail = [], {}
    return run
