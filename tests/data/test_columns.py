"""What columns mean, and each thing that can be wrong with a row."""

from __future__ import annotations

import pytest

from lofi.data.records import from_rows, load_records
from lofi.errors import DataError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "completion": "b", "references": ["c", "d"]}, "sft"),
        ({"prompt": "", "completion": "b"}, "sft"),
        ({"prompt": TURNS[:1], "completion": "b"}, "sft"),
        ({"messages": TURNS}, "messages"),
        ({"text": "a"}, "text"),
        ({"text": "a", "label": 0}, "classification"),
        ({"text": "a", "label": "good"}, "classification"),
        ({"text": "a", "labels": ["x", "y"]}, "classification"),
        ({"tokens": ["a", "b"], "tags": ["O", "B-x"]}, "token_classification"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    ],
)
def test_a_kind_is_recognised_by_its_columns(row, kind):
    assert from_rows([row]).kind == kind


def test_a_mapping_renames_and_keeps_the_rest():
    records = from_rows([{"quote": "q", "author": "w", "tags": ["t"]}], columns={"text": "quote"})
    assert records.kind == "text"
    assert records.rows[0] == {"quote": "q", "author": "w", "tags": ["t"], "text": "q"}


def test_a_mapping_chooses_among_kinds():
    records = from_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}], columns={"completion": "chosen"})
    assert (records.kind, records.rows[0]["completion"]) == ("sft", "b")


def test_a_single_reference_becomes_a_list():
    assert from_rows([{"prompt": "a", "completion": "b", "references": "c"}]).rows[0]["references"] == ["c"]


def test_labels_holding_one_value_is_a_label_and_label_holding_a_list_is_labels():
    assert from_rows([{"text": "a", "labels": 1}]).rows[0] == {"text": "a", "label": 1}
    assert from_rows([{"text": "a", "label": [1, 2]}]).rows[0] == {"text": "a", "labels": [1, 2]}


def test_csv_labels_become_integers_only_when_all_are(write):
    numbers = load_records(write("a.csv", b"text,label\nx,0\ny,1\n"))
    words = load_records(write("b.csv", b"text,label\nx,0\ny,one\n"))
    lists = load_records(write("c.csv", b'tokens,tags\n"[""a"", ""b""]","[""O"", ""X""]"\n'))
    assert [row["label"] for row in numbers] == [0, 1]
    assert [row["label"] for row in words] == ["0", "one"]
    assert lists.rows[0] == {"tokens": ["a", "b"], "tags": ["O", "X"]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": ""}, "empty completion"),
        ({"prompt": "a", "completion": " \n"}, "empty completion"),
        ({"prompt": 3, "completion": "b"}, "prompt is 3 (int); expected a string"),
        ({"prompt": "a", "completion": ["b"]}, "completion is ['b'] (list)"),
        ({"prompt": "a", "completion": "b", "references": []}, "references must be a list"),
        ({"prompt": [{"role": "user"}], "completion": "b"}, "prompt, item 1"),
        ({"text": "  "}, "empty text"),
        ({"text": None}, "no text"),
        ({"text": "a", "label": 0.5}, "label is 0.5 (float)"),
        ({"text": "a", "label": ""}, "label is ''"),
        ({"text": "a", "labels": [1, None]}, "labels is [1, None]"),
        ({"messages": []}, "messages is []"),
        ({"messages": [{"from": "human", "value": "x"}]}, "expected {role: user, content: text}"),
        ({"messages": TURNS[:1]}, "no message has the role assistant"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "empty completion: an assistant's message"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
        ({"tokens": [], "tags": []}, "tokens is []"),
        ({"tokens": ["a"], "tags": "O"}, "tags is 'O'"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty chosen"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, says):
    with pytest.raises(DataError) as caught:
        from_rows([row], source="made")
    assert says in str(caught.value)
    assert str(caught.value).startswith("made:row 1: ")


def test_a_column_missing_in_one_row_is_named_with_that_row(write):
    path = write("x.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"x.jsonl:2: no completion.*this row has 'prompt', 'output'"):
        load_records(path)


def test_unknown_columns_are_listed_with_a_mapping_worth_trying():
    with pytest.raises(DataError) as caught:
        from_rows([{"instruction": "a", "output": "b"}])
    assert "'instruction', 'output'" in str(caught.value)
    assert "{prompt: instruction, completion: output}" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"promt": "a"}, "nearest 'prompt'"),
        ({"prompt": "instructon", "completion": "output"}, "nearest 'instruction'"),
        ({"prompt": "instruction"}, "makes no kind of data"),
        ({"prompt": "instruction", "text": "output"}, "makes no kind of data"),
    ],
)
def test_a_wrong_mapping_is_an_error(columns, says):
    with pytest.raises(DataError) as caught:
        from_rows([{"instruction": "a", "output": "b"}], columns=columns)
    assert says in str(caught.value)
