"""The model and the rows that ship with lofi, by name: `demo:model`, `demo:train`, `demo:validation`, `demo:test`.

Study files name them where they would name a folder or a file, so that they run right after the installation, offline.
The model is the one in the package; the rows come from the demo's grammar and are written into a cache folder;
`demo:train-100` is the first hundred of them.
Knows not  studies or recipes: it sees plain values. Rejected  writing into the study's own folder: a study that is
refused leaves nothing there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lofi.demo.dataset import make_rows
from lofi.demo.run import MODEL
from lofi.errors import RecipeError
from lofi.files.atomic import disk_errors, write_text
from lofi.recipe.words import no_such

PREFIX = "demo:"
SEED = 0
ROWS = {"train": ("train", 2000), "validation": ("test_seen", 200), "test": ("test_unseen", 200)}
"""Name -> the demo's split and how many rows: questions about unseen schemas are the test."""
NAMES = tuple(f"{PREFIX}{name}" for name in ("model", *ROWS))


def cache_folder() -> Path:
    """Where rows that ship are written: $XDG_CACHE_HOME/lofi/demo, ~/.cache/lofi/demo where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lofi" / "demo"


def with_shipped(values: Any, folder: str | Path | None = None) -> Any:
    """Nested plain values with every text `demo:NAME` as a path; rows that are needed are written into `folder`.

    The rows are the same every time; a file that holds others is written anew. `folder` is `cache_folder()` unless
    given.
    Raises  RecipeError for a name that does not ship; LofiError where the folder cannot be written
    """
    folder = folder if folder is not None else cache_folder()
    if isinstance(values, dict):
        return {key: with_shipped(value, folder) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(with_shipped(value, folder) for value in values)
    return _path(values, Path(folder)) if isinstance(values, str) and values.startswith(PREFIX) else values


def shipped_model(name: str) -> str:
    """The folder of the model that ships.  Raises  RecipeError for any other `demo:` name"""
    if name != NAMES[0]:
        raise RecipeError(f"{name} is no model; the one that ships with lofi is {NAMES[0]}")
    return str(MODEL)


def _path(name: str, folder: Path) -> str:
    found = re.fullmatch(rf"({'|'.join(NAMES)})(?:-([1-9][0-9]*))?", name)
    if found is None or (found[2] and found[1] == NAMES[0]):
        raise RecipeError(no_such("what ships", name, NAMES))
    kind = found[1].removeprefix(PREFIX)
    if kind == "model":
        return str(MODEL)
    split, most = ROWS[kind]
    count = int(found[2] or most)
    if count > most:
        raise RecipeError(f"{name} asks for {count} rows, but {found[1]} has {most}; ask for at most as many")
    return str(_rows(split, count, folder / f"{name.removeprefix(PREFIX)}.jsonl"))


def _rows(split: str, count: int, path: Path) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(count, SEED, split))
    if not path.is_file() or path.read_bytes() != text.encode():  # an earlier version's grammar made others
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path
