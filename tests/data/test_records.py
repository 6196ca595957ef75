"""Finding data: files, folders, hub ids, and what is said when there is nothing there."""

from __future__ import annotations

import hashlib

import pytest

from lofi.data.records import from_rows, load_records
from lofi.errors import DataError

ROWS = [{"prompt": "a", "completion": "b", "extra": 1}, {"prompt": "c", "completion": "d"}]


def test_records_know_kind_place_and_digest_and_keep_other_columns(write):
    path = write("train.jsonl", ROWS)
    records = load_records(path)
    assert (records.kind, len(records), records.source) == ("sft", 2, str(path))
    assert records.where(1) == f"{path}:2"
    assert records.rows[0]["extra"] == 1
    assert records.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_gives_the_split_that_is_asked_for(write, tmp_path):
    write("train.jsonl", ROWS)
    write("validation.jsonl", ROWS[:1])
    assert len(load_records(tmp_path)) == 2
    assert len(load_records(tmp_path, split="validation")) == 1
    with pytest.raises(DataError, match=r"train.jsonl, validation.jsonl but nothing for 'test'"):
        load_records(tmp_path, split="test")


def test_two_files_for_one_split_are_not_chosen_between(write, tmp_path):
    write("train.jsonl", ROWS)
    write("train.json", ROWS)
    with pytest.raises(DataError, match="name the one you mean"):
        load_records(tmp_path)


def test_a_folder_that_datasets_wrote_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[1:])}).save_to_disk(tmp_path / "saved")
    records = load_records(tmp_path / "saved")
    assert records.rows == ROWS[1:]
    assert records.where(0).endswith("saved[train]:row 1")
    assert len(records.sha256) == 64
    with pytest.raises(DataError, match="could not be read"):
        load_records(tmp_path / "saved", split="test")


def test_a_missing_file_names_the_nearest_one(write, tmp_path):
    write("train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"does not exist.*nearest 'train.jsonl'"):
        load_records(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="nor does its folder"):
        load_records(tmp_path / "nowhere" / "train.jsonl")


def test_a_hub_id_without_a_network_gets_one_sentence():
    with pytest.raises(DataError) as caught:
        load_records("nobody/no-such-data")
    assert "no file or folder here" in str(caught.value)
    assert "go online" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_and_an_empty_list_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        load_records(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        from_rows([])


def test_the_limit_must_be_positive_and_is_kept(write):
    path = write("train.jsonl", ROWS)
    assert len(load_records(path, limit=1)) == 1
    with pytest.raises(DataError, match="limit is 0"):
        load_records(path, limit=0)


def test_rows_in_memory_are_checked_and_not_changed():
    given = [{"text": "x", "label": True}, {"text": "y", "label": False}]
    records = from_rows(given, source="made")
    assert records.kind == "classification"
    assert records.where(1) == "made:row 2"
    assert given[0] == {"text": "x", "label": True}


@pytest.mark.parametrize(
    ("name", "columns", "kind", "count"),
    [
        ("dialogsum", {"prompt": "dialogue", "completion": "summary"}, "sft", 500),
        ("e2e_nlg", None, "sft", 547),
        ("english_quotes", {"text": "quote"}, "text", 250),
        ("hh_helpful", None, "preference", 300),
        ("instruct_1100", None, "sft", 55),
        ("sentence_polarity", None, "classification", 800),
        ("vi_diacritics", None, "sft", 529),
        ("wnut17_ner", None, "token_classification", 1009),
    ],
)
def test_every_shared_data_set_is_understood(shared, name, columns, kind, count):
    records = load_records(shared / "data" / name, columns=columns, split="validation")
    assert (records.kind, len(records)) == (kind, count)
