"""The demo's rows: training rows, questions about schemas that training saw, questions about schemas it never saw.

Knows how a prompt is written and which rows make a fair test; knows no model and no tokenizer. A row carries all that
is needed to check an answer: the right SQL and the recipe of its database (schema and seed).
Rejected: a fixed share for each kind of question; a kind is drawn, and drawn again where the schema does not allow it.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from pathlib import Path

from lofi.errors import RequestError

from .execute import open_database, run_query, same_answer
from .grammar import Question, make_question
from .schemas import Schema, fixed_schemas, random_schema

SPLITS = ("train", "test_seen", "test_unseen")
FIXED_SHARE = 0.3


def make_rows(n: int, seed: int, split: str) -> list[dict]:
    """Make n rows of a split, a pure function of (n, seed, split).

    train: FIXED_SHARE of the rows ask about the training domains' schemas, the others about a random schema each.
    test_seen: unseen questions, numbers and texts about the training domains' schemas; the rows differ from each other.
    test_unseen: the same about schemas whose tables and columns occur in no training row.
    Raises  RequestError if the split's name is none of SPLITS.
    """
    if split not in SPLITS:
        raise RequestError(f"The demo has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, dict] = {}
    while len(rows) < n:
        question = _draw(rng, split)
        if split == "train" or is_telling(question):
            row = to_row(question)
            rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _draw(rng: random.Random, split: str) -> Question:
    if split != "train":
        schema = rng.choice(fixed_schemas("train" if split == "test_seen" else "unseen"))
        return make_question(schema, rng, testing=True)
    schema = rng.choice(fixed_schemas("train")) if rng.random() < FIXED_SHARE else random_schema(rng)
    return make_question(schema, rng, testing=False)


def to_row(question: Question) -> dict:
    """The question as a data row: prompt and completion to train on, the rest to check and report."""
    return {
        "prompt": prompt_for(question.schema, question.text),
        "completion": question.sql,
        "kind": question.kind,
        "language": question.language,
        "database": {"seed": question.seed, "tables": question.schema.to_dict()},
    }


def prompt_for(schema: Schema, question: str) -> str:
    """What the model is shown: the tables, then the question."""
    return f"Tables: {schema.text()}\n{question}"


def is_telling(question: Question) -> bool:
    """True if the answer is not empty, not a lone NULL or 0, and changes when the condition is left out."""
    connection = open_database(question.schema, question.seed)
    try:
        rows = run_query(connection, question.sql)
        if rows in ([], [(None,)], [(0,)]):
            return False
        bare = re.sub(r" where .*$", "", question.sql)
        return bare == question.sql or not same_answer(run_query(connection, bare), rows, ordered=False)
    except sqlite3.Error as error:
        raise AssertionError(f"the grammar made SQL that does not run: {question.sql}") from error
    finally:
        connection.close()


def write_rows(folder: Path, *, train: int, test: int, seed: int) -> dict[str, Path]:
    """Write train.jsonl, test_seen.jsonl and test_unseen.jsonl (UTF-8, one row a line) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    for split, path in paths.items():
        rows = make_rows(train if split == "train" else test, seed, split)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths
