"""Records: the rows of a data set, what kind they are, and where each came from.

This file knows where data lives (a file, a folder, a hub id); formats are `readers`, meanings are `columns`. A hub id
is used only where no such local path exists. Rejected: handing every file to `datasets` (slow to import, and its errors
hide the line); dropping bad rows with a warning (a wrong artifact with exit code 0).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lofi.data.columns import understand
from lofi.data.faults import nearest
from lofi.data.readers import SUFFIXES, Raw, read_file
from lofi.errors import DataError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Records:
    """Checked rows of one kind; `rows[i]` stood at `where(i)`."""

    rows: list[dict[str, Any]]
    kind: str
    """sft, messages, text, classification, token_classification or preference."""
    source: str
    places: list[str]
    file: Path | None = None
    """The one local file the rows came from, when there is one."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def where(self, index: int) -> str:
        """The place of row `index`, for messages: "train.jsonl:17"."""
        return self.places[index]

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file's bytes; of the rows as canonical JSON where there is no single file."""
        digest = hashlib.sha256()
        if self.file is None:
            for row in self.rows:
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
            return digest.hexdigest()
        with self.file.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def load_records(
    source: str | Path, *, columns: dict[str, str] | None = None, split: str | None = None, limit: int | None = None
) -> Records:
    """Load and check a data set.

    source   a .jsonl, .json, .csv or .parquet file; a folder of such (`split`.jsonl …) or one that `datasets` wrote;
             a hub id, or "id:configuration"
    columns  {canonical name: column of the file}, for example {prompt: dialogue, completion: summary}
    split    which part of a folder or hub id (default train); a file is one part already
    limit    read the first `limit` rows only
    Raises   DataError, naming file and line of up to five faults
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; expected at least 1 row")
    path = Path(source).expanduser()
    file: Path | None = None
    if path.is_dir():
        file = _file_in(path, split or "train")
        raw = read_file(file, limit=limit) if file else _from_datasets(str(path), split or "train", limit, folder=path)
    elif path.exists():
        file, raw = path, read_file(path, limit=limit)
    elif _may_be_hub_id(str(source)):
        raw = _from_datasets(str(source), split or "train", limit)
    else:
        raise DataError(_missing(path))
    name = str(file or source)
    return Records(raw.rows, understand(raw, name, columns), name, raw.places, file)


def from_rows(
    rows: Sequence[dict[str, Any]], *, source: str = "rows", columns: dict[str, str] | None = None
) -> Records:
    """Check rows that are already in memory; they are copied, and row i stands at "<source>:row i+1".

    Raises  DataError as load_records
    """
    if not rows:
        raise DataError(f"{source} is empty; expected at least one row")
    raw = Raw([dict(row) for row in rows], [f"{source}:row {number}" for number in range(1, len(rows) + 1)])
    return Records(raw.rows, understand(raw, source, columns), source, raw.places)


def _file_in(folder: Path, split: str) -> Path | None:
    """The file of `split` in a folder; None where the folder is for `datasets` to read."""
    files = [entry for entry in sorted(folder.iterdir()) if entry.suffix.lower() in SUFFIXES and entry.is_file()]
    if _saved_by_datasets(folder):
        return None
    named = [file for file in files if file.stem == split]
    if len(named) > 1:
        raise DataError(
            f"{folder} holds {', '.join(file.name for file in named)}; expected one file for {split}; "
            "name the one you mean"
        )
    if named:
        return named[0]
    if not files and any(folder.rglob("*.parquet")):
        return None
    if not files:
        raise DataError(
            f"{folder} holds no data file; expected {split}.jsonl (or .json, .csv, .parquet); name the file itself"
        )
    raise DataError(
        f"{folder} holds {', '.join(file.name for file in files)} but nothing for {split!r}; "
        "name one of the files instead of the folder"
    )


def _saved_by_datasets(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _may_be_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix.lower() not in (
        *SUFFIXES,
        ".txt",
        ".tsv",
        ".gz",
        ".zip",
    )


def _from_datasets(name: str, split: str, limit: int | None, folder: Path | None = None) -> Raw:
    """Rows through the `datasets` library: a folder it wrote, a folder of parquet shards, or a hub id."""
    import datasets

    try:
        if folder is not None and _saved_by_datasets(folder):
            found = datasets.load_from_disk(name)
            data = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            hub_name, _, configuration = name.partition(":") if folder is None else (name, "", "")
            data = datasets.load_dataset(hub_name, configuration or None, split=split)
    except Exception as error:  # the library raises a dozen types, from network to schema
        raise DataError(_unloadable(name, split, error, folder)) from error
    rows = [dict(row) for row in (data.select(range(min(limit, len(data)))) if limit else data)]
    if not rows:
        raise DataError(f"{name}, split {split}, is empty; expected at least one row")
    return Raw(rows, [f"{name}[{split}]:row {number}" for number in range(1, len(rows) + 1)])


def _unloadable(name: str, split: str, error: Exception, folder: Path | None) -> str:
    reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
    if folder is not None:
        return f"{name}, split {split}, could not be read ({reason}); name one data file in it instead"
    return (
        f"{name!r} is no file or folder here{_nearest_beside(Path(name))}, and as a hub data set it could not be "
        f"loaded, split {split} ({reason}); check the spelling, or go online"
    )


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return (
            f"{path} does not exist, nor does its folder; expected a data file, a folder, or a hub id; check the path"
        )
    near = _nearest_beside(path) or "; check the path"
    return f"{path} does not exist; expected a data file, a folder, or a hub id{near}"


def _nearest_beside(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""
