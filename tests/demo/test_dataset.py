"""The rows of the demo: reproducible, answerable, and with nothing of the test in training."""

from __future__ import annotations

import json
import re

import pytest

from lofi.demo.dataset import SPLITS, make_rows, write_rows
from lofi.demo.execute import execution_accuracy
from lofi.demo.schemas import Schema, fixed_schemas
from lofi.errors import RequestError


def names_in(rows: list[dict]) -> set[str]:
    return {name for row in rows for name in Schema.from_dict(row["database"]["tables"]).names()}


def test_rows_are_a_function_of_their_seed():
    assert make_rows(30, 6, "train") == make_rows(30, 6, "train") != make_rows(30, 7, "train")


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_answers_itself_and_no_prompt_comes_twice(split):
    rows = make_rows(90, 1, split)
    assert len({row["prompt"] for row in rows}) == len(rows) == 90
    assert all(execution_accuracy(row["completion"], row) == 1.0 for row in rows)
    assert {row["language"] for row in rows} == {"en", "vi"}


def test_unseen_questions_use_no_name_that_training_used():
    assert not names_in(make_rows(2000, 0, "train")) & names_in(make_rows(200, 0, "test_unseen"))


def test_seen_questions_are_about_trained_schemas_but_not_trained_questions():
    train, seen = make_rows(4000, 0, "train"), make_rows(200, 0, "test_seen")
    shown = {row["prompt"].partition("\n")[0] for row in train}
    assert {row["prompt"].partition("\n")[0] for row in seen} <= shown
    assert len(shown) > 2000 > len(fixed_schemas("train"))


def test_no_tested_condition_was_trained():
    def conditions(rows):
        return {c for row in rows for c in re.findall(r"\w+ [<>=] (?:'.*?'|\d+)", row["completion"])}

    assert not conditions(make_rows(4000, 0, "train")) & conditions(make_rows(300, 0, "test_seen"))


def test_files_hold_the_rows_one_a_line_in_utf8(tmp_path):
    paths = write_rows(tmp_path / "data", train=40, test=9, seed=3)
    assert list(paths) == list(SPLITS)
    for split, n in (("train", 40), ("test_seen", 9), ("test_unseen", 9)):
        lines = paths[split].read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == make_rows(n, 3, split)
    assert any(ord(c) > 127 for c in paths["train"].read_text(encoding="utf-8"))


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(RequestError, match=r"no split 'test'.*train, test_seen, test_unseen"):
        make_rows(1, 0, "test")
