"""Does the SQL give the right answer? Both queries are run on the question's own database and their rows compared.

Knows sqlite3 and how to keep a model's SQL harmless: the database lives in memory, an authorizer admits reading and a
short list of functions, a step limit ends endless queries, and too many rows count as an error. Knows no model.
Rejected: comparing SQL texts (that is `exact_match`, reported beside this); two texts may ask the same thing.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping

from .schemas import Schema, database

STEPS = 200_000
MAX_ROWS = 5_000
FUNCTIONS = frozenset(("count", "sum", "total", "avg", "min", "max", "abs", "round", "length", "lower", "upper"))
_ALLOWED = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ))
_TYPES = {"key": "integer primary key", "link": "integer", "number": "integer", "label": "text", "text": "text"}


def open_database(schema: Schema, seed: int) -> sqlite3.Connection:
    """The filled database in memory, from then on read-only for whatever SQL is given to it."""
    connection = sqlite3.connect(":memory:")
    for table in schema.tables:
        columns = ", ".join(f'"{c.name}" {_TYPES[c.kind]}' for c in table.columns)
        connection.execute(f'create table "{table.name}" ({columns})')
    for name, rows in database(schema, seed).items():
        marks = ", ".join("?" * len(rows[0]))
        connection.executemany(f'insert into "{name}" values ({marks})', rows)
    connection.commit()
    connection.set_authorizer(_authorize)
    return connection


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    named = (second or "").lower()
    allowed = action in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and named in FUNCTIONS)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def run_query(connection: sqlite3.Connection, sql: str) -> list[tuple]:
    """The rows of one SELECT.

    Raises  sqlite3.Error for anything else: a write, a pragma, two statements, a query of more than STEPS virtual
            machine steps or MAX_ROWS rows, or SQL that does not parse (a NUL byte in it included).
    """
    started = iter((False,))
    connection.set_progress_handler(lambda: next(started, True), STEPS)
    try:
        rows = connection.execute(sql).fetchmany(MAX_ROWS + 1)
    except (ValueError, sqlite3.Warning) as error:
        raise sqlite3.ProgrammingError(str(error)) from error
    finally:
        connection.set_progress_handler(None, 0)
    if len(rows) > MAX_ROWS:
        raise sqlite3.OperationalError(f"more than {MAX_ROWS} rows")
    return rows


def same_answer(rows: list[tuple], expected: list[tuple], *, ordered: bool) -> bool:
    """True if the rows are the same, numbers to nine significant digits; their order counts only if `ordered`."""
    given, wanted = ([_rounded(row) for row in side] for side in (rows, expected))
    return given == wanted if ordered else Counter(given) == Counter(wanted)


def _rounded(row: tuple) -> tuple:
    return tuple(f"{value:.9g}" if isinstance(value, int | float) else value for value in row)


def execution_accuracy(prediction: str, row: Mapping) -> float:
    """1.0 if the predicted SQL returns what the row's own SQL returns, else 0.0; SQL that fails is wrong.

    `row` is one that `dataset.make_rows` made: its `completion` is the right SQL and its `database` rebuilds the rows.
    """
    schema, seed = Schema.from_dict(row["database"]["tables"]), row["database"]["seed"]
    connection = open_database(schema, seed)
    try:
        expected = run_query(connection, row["completion"])
        rows = run_query(connection, prediction)
    except sqlite3.Error:
        return 0.0
    finally:
        connection.close()
    return float(same_answer(rows, expected, ordered=" order by " in row["completion"]))
