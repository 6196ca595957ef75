"""Files become plain rows: jsonl, json, csv, parquet, each row with the place it came from.

This file knows file formats and encodings; it does not know what the columns mean. A UTF-8 byte order mark and CRLF
line ends are tolerated, blank lines skipped, strings kept exactly as written. Rejected: `datasets` or pandas for local
files (seconds of import, and their errors name neither the line nor the remedy); `str.splitlines` (it splits on U+2028,
which JSON allows inside strings).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.data.faults import Faults
from lofi.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_BOM = b"\xef\xbb\xbf"
_UTF8_REMEDY = "expected UTF-8; save the file as UTF-8"


@dataclass
class Raw:
    """Rows as the file has them, and `places[i]`, where row i stands ("train.jsonl:17")."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    textual: bool = False  # csv: every value is a string

    def add(self, row: dict[str, Any], place: str) -> None:
        self.rows.append(row)
        self.places.append(place)


def read_file(path: Path, *, limit: int | None = None) -> Raw:
    """Read at most `limit` rows of one local file, by its suffix.

    Raises  DataError: unknown suffix, unreadable, empty, invalid UTF-8, broken JSON, a row that is not an object
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path} ends in {suffix or 'nothing'!r}; lofi reads {', '.join(SUFFIXES)}; convert the file or rename it"
        )
    faults = Faults(str(path))
    try:
        raw = _READERS[suffix](path, limit, faults)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    faults.raise_if_any()
    if not raw.rows:
        raise DataError(f"{path} is empty; expected at least one row")
    return raw


def _lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """Every line of a UTF-8 file with its number from 1; a line that is not UTF-8 becomes a fault."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                faults.add(f"{path}:{number}", f"invalid UTF-8 at byte {error.start + 1} of the line; {_UTF8_REMEDY}")


def _read_jsonl(path: Path, limit: int | None, faults: Faults) -> Raw:
    raw = Raw()
    for number, line in _lines(path, faults):
        if not line.strip():
            continue
        if limit is not None and len(raw.rows) >= limit:
            break
        _add_json_line(raw, line, f"{path}:{number}", faults)
    return raw


def _add_json_line(raw: Raw, line: str, place: str, faults: Faults) -> None:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        what = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        )
        faults.add(place, f"broken JSON ({what}); expected one JSON object a line; repair or remove the line")
        return
    if isinstance(row, dict):
        raw.add(row, place)
    else:
        faults.add(place, f"{_type(row)} where one JSON object with named columns was expected; write {{...}} a line")


def _read_json(path: Path, limit: int | None, faults: Faults) -> Raw:
    """A list of objects; a .json file that begins with an object is read as one object a line."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
    if start.startswith(b"{"):
        return _read_jsonl(path, limit, faults)
    raw = Raw()
    for number, row in enumerate(_json_list(path), 1):
        if limit is not None and len(raw.rows) >= limit:
            break
        if isinstance(row, dict):
            raw.add(row, f"{path}:row {number}")
        else:
            faults.add(f"{path}:row {number}", f"{_type(row)} where an object with named columns was expected")
    return raw


def _json_list(path: Path) -> list[Any]:
    try:
        text = path.read_bytes().removeprefix(_BOM).decode("utf-8")
        content = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {error.start + 1}; {_UTF8_REMEDY}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}); "
            "expected a list of objects; repair it"
        ) from error
    if not isinstance(content, list):
        raise DataError(f"{path} holds {_type(content)}; expected a list of objects, or one object a line")
    return content


def _read_csv(path: Path, limit: int | None, faults: Faults) -> Raw:
    raw = Raw(textual=True)
    reader = csv.reader((line for _, line in _lines(path, faults)), strict=True)
    try:
        header = next(reader, [])
        _check_header(header, path, faults)
        for cells, line in _csv_rows(reader):
            if limit is not None and len(raw.rows) >= limit:
                break
            if len(cells) == len(header):
                raw.add(dict(zip(header, cells, strict=True)), f"{path}:{line}")
            else:
                faults.add(
                    f"{path}:{line}", f"{len(cells)} cells; expected {len(header)}, as the header has; quote the commas"
                )
    except csv.Error as error:
        faults.add(f"{path}:{reader.line_num}", f"broken CSV ({error}); check the quotes, or use jsonl or parquet")
    return raw


def _csv_rows(reader: Any) -> Iterator[tuple[list[str], int]]:
    """Non-blank rows with the line they begin on (a quoted cell may span lines)."""
    begins = reader.line_num + 1
    for cells in reader:
        if cells:
            yield cells, begins
        begins = reader.line_num + 1


def _check_header(header: list[str], path: Path, faults: Faults) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        faults.add(
            f"{path}:1", f"the header names {', '.join(map(repr, twice))} twice; expected different names; rename one"
        )


def _read_parquet(path: Path, limit: int | None, faults: Faults) -> Raw:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path} is not a readable parquet file ({reason}); write it again") from error
    rows = table.slice(0, limit).to_pylist()
    return Raw(rows, [f"{path}:row {number}" for number in range(1, len(rows) + 1)])


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
