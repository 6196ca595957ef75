"""Where an adapter comes from: hashes of data, tokenizer, template and code, and the versions that made it.

Knows how to hash; does not know which of it matters to whom.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MADE_WITH = ("torch", "transformers", "tokenizers", "safetensors", "accelerate")


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_files(paths: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 by file name as given."""
    return {str(path): hash_file(path) for path in paths}


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does to text: model, merges, added tokens, normaliser, special tokens.

    Padding and truncation are left out: they are set by whoever called the tokenizer last.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("padding", None), body.pop("truncation", None)
    else:
        body = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return _hash_json({"body": body, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}})


def hash_template(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None for a tokenizer without one."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else _hash_json(template)


def hash_code() -> str:
    """SHA-256 over lofi's own Python sources, names and contents."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _MADE_WITH:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
