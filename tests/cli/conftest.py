"""A small model, a small data set and one trained run, shared by the tests of the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, lofi_tiny) -> Path:
    """A random two-layer Llama with lofi-tiny's tokenizer (float32, in != out, odd inner size)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(lofi_tiny / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with train, validation and test rows of prompt and completion."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"count to {i + 2}", "completion": " ".join(WORDS[: i + 2])} for i in range(8)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", rows[:3])
    write_rows(folder / "test.jsonl", rows[2:6])
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_model, data) -> Path:
    """The run folder of a short training run, made by the command line itself."""
    from lofi.cli.main import main

    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ["train.max_steps=4", "train.batch_tokens=64", "train.learning_rate=0.01", "lora.r=3", "lora.lora_alpha=12"]
    flags = ["--model", str(small_model), "--data", str(data), "--output", str(folder), "--dtype", "fp32"]
    assert main(["train", *flags, *words]) == 0
    return folder


@pytest.fixture
def adapter(finished, tmp_path) -> Path:
    """A copy of the trained adapter that a test may damage."""
    return Path(shutil.copytree(finished / "adapter", tmp_path / "copy"))
