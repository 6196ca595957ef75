"""Tokenizers for the data room's tests: the one that ships, and small ones made here with a given habit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chat_tokenizer(lofi_tiny: Path) -> Any:
    """lofi-tiny's: ChatML, <|im_end|> is 3, bos = eos = 1, adds nothing by itself."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lofi_tiny)


@pytest.fixture
def plain_tokenizer(lofi_tiny: Path) -> Any:
    """The same without its template, and with pad = eos, so that a mask by token id would hide the end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lofi_tiny)
    tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(name, rows or bytes) -> the file's path."""

    def to_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
        return path

    return to_file
