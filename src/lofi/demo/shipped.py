"""The model and the rows that ship with lofi, by name: `demo:model`, `demo:train`, `demo:validation`, `demo:test`.

Study files name them where they would name a folder or a file, so that they run right after the installation, offline.
The model is the one in the package; the rows come from the demo's grammar and are written where the caller says;
`demo:train-100` is the first hundred of them.
Knows not  studies or recipes: it sees plain values.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lofi.demo.dataset import make_rows
from lofi.demo.run import MODEL
from lofi.errors import RecipeError
from lofi.files.atomic import write_text
from lofi.recipe.words import no_such

PREFIX = "demo:"
SEED = 0
ROWS = {"train": ("train", 2000), "validation": ("test_seen", 200), "test": ("test_unseen", 200)}
"""Name -> the demo's split and how many rows: questions about unseen schemas are the test."""
NAMES = tuple(f"{PREFIX}{name}" for name in ("model", *ROWS))


def with_shipped(values: Any, folder: str | Path) -> Any:
    """Nested plain values with every text `demo:NAME` as a path; rows that are needed are written into `folder`.

    The rows are the same every time, and a file that is there is kept.
    Raises  RecipeError for a name that does not ship
    """
    if isinstance(values, dict):
        return {key: with_shipped(value, folder) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(with_shipped(value, folder) for value in values)
    return _path(values, Path(folder)) if isinstance(values, str) and values.startswith(PREFIX) else values


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
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = make_rows(count, SEED, split)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
