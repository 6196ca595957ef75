"""What ships, by name: paths in place of `demo:` names, rows written once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lofi.demo import shipped
from lofi.demo.shipped import ROWS, with_shipped
from lofi.errors import LofiError, RecipeError


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(shipped, "ROWS", {name: (split, 7) for name, (split, _) in ROWS.items()})


def test_names_anywhere_in_nested_values_become_paths_and_the_rest_stays(tmp_path, lofi_tiny):
    values = {"model": "demo:model", "data": {"train": "demo:train"}, "seeds": [0, 1], "pair": ("demo:test", "x")}
    found = with_shipped(values, tmp_path / "data")
    assert found["model"] == str(lofi_tiny) and found["seeds"] == [0, 1]
    assert found["data"] == {"train": str(tmp_path / "data" / "train.jsonl")}
    assert found["pair"] == (str(tmp_path / "data" / "test.jsonl"), "x")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test.jsonl", "train.jsonl"]
    assert values["model"] == "demo:model"


def test_rows_are_the_same_every_time_and_a_file_that_holds_others_is_written_anew(tmp_path):
    one, two = (with_shipped("demo:train", tmp_path / name) for name in ("one", "two"))
    text = (tmp_path / "one" / "train.jsonl").read_text(encoding="utf-8")
    assert text == (tmp_path / "two" / "train.jsonl").read_text(encoding="utf-8") and one != two
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 7 and all(row["prompt"] and row["completion"] for row in rows)
    (tmp_path / "one" / "train.jsonl").write_text("mine\n")
    assert with_shipped("demo:train", tmp_path / "one") == one
    assert (tmp_path / "one" / "train.jsonl").read_text(encoding="utf-8") == text


def test_rows_go_into_the_cache_where_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert with_shipped(["demo:test"]) == [str(tmp_path / "lofi" / "demo" / "test.jsonl")]


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LofiError, match="file"):
        with_shipped("demo:train", tmp_path / "file" / "folder")


def test_the_test_asks_about_tables_that_training_never_saw(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "ROWS", ROWS)
    tables = {}
    for name in ("train", "test"):
        lines = Path(with_shipped(f"demo:{name}", tmp_path)).read_text(encoding="utf-8").splitlines()
        tables[name] = {json.loads(line)["prompt"].partition("\n")[0] for line in lines}
        assert len(lines) == ROWS[name][1]
    assert not tables["train"] & tables["test"]


def test_a_name_that_does_not_ship_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(RecipeError, match=r"'demo:tran', expected one of .*did you mean demo:train\?"):
        with_shipped({"data": {"train": "demo:tran"}}, tmp_path)


def test_a_number_behind_a_name_takes_the_first_rows(tmp_path):
    whole = Path(with_shipped("demo:train", tmp_path)).read_text(encoding="utf-8").splitlines()
    few = Path(with_shipped("demo:train-3", tmp_path))
    assert few.name == "train-3.jsonl" and few.read_text(encoding="utf-8").splitlines() == whole[:3]


def test_more_rows_than_there_are_and_a_number_of_models_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="asks for 8 rows, but demo:train has 7"):
        with_shipped("demo:train-8", tmp_path)
    with pytest.raises(RecipeError, match="demo:model-2"):
        with_shipped("demo:model-2", tmp_path)


def test_a_model_by_name_is_the_one_that_ships_and_rows_are_no_model(lofi_tiny):
    from lofi.demo.run import SHIPPED

    assert shipped.shipped_model(SHIPPED) == str(lofi_tiny)
    with pytest.raises(RecipeError, match="demo:test is no model; the one that ships with lofi is demo:model"):
        shipped.shipped_model("demo:test")
