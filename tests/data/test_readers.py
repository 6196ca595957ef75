"""Reading files: every format, every way a file can be broken."""

from __future__ import annotations

import json

import pytest

from lofi.data.readers import read_file
from lofi.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\u2028d", "completion": "ầ"}]


def test_jsonl_keeps_strings_and_lines(write):
    raw = read_file(write("x.jsonl", ROWS))
    assert raw.rows == ROWS
    assert [place.rsplit(":", 1)[1] for place in raw.places] == ["1", "2"]


def test_a_byte_order_mark_crlf_and_blank_lines_are_tolerated_and_lines_still_count(write):
    lines = [json.dumps(row) for row in ROWS]
    raw = read_file(write("x.jsonl", ("\ufeff" + lines[0] + "\r\n\r\n  \r\n" + lines[1]).encode()))
    assert raw.rows == ROWS
    assert raw.places[1].endswith("x.jsonl:4")


def test_a_list_in_a_json_file_and_lines_in_a_json_file_read_alike(write):
    listed = read_file(write("a.json", json.dumps(ROWS).encode()))
    lines = read_file(write("b.json", ROWS))
    assert listed.rows == lines.rows == ROWS
    assert listed.places[1].endswith("a.json:row 2")


def test_csv_reads_quoted_newlines_and_names_the_line_a_row_begins_on(write):
    raw = read_file(write("x.csv", '\ufeffprompt,completion\r\n"a\nb",c\r\nd,"e,""f"""\r\n'.encode()))
    assert raw.rows[0] == {"prompt": "a\nb", "completion": "c"}
    assert raw.rows[1] == {"prompt": "d", "completion": 'e,"f"'}
    assert [place.rsplit(":", 1)[1] for place in raw.places] == ["2", "4"]


def test_parquet_round_trips(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_file(path).rows == ROWS
    assert len(read_file(path, limit=1).rows) == 1


def test_the_limit_stops_before_later_faults(write):
    path = write("x.jsonl", json.dumps(ROWS[0]).encode() + b"\n{broken")
    assert len(read_file(path, limit=1).rows) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n \n", "is empty"),
        ("x.json", b"", "is empty"),
        ("x.json", b"[]", "is empty"),
        ("x.csv", b"", "is empty"),
        ("x.csv", b"prompt,completion\n", "is empty"),
        ("x.jsonl", b'{"a": 1}\n{"a": ', "x.jsonl:2: broken JSON"),
        ("x.jsonl", b'{"a": 1}\n[1, 2]\n', "x.jsonl:2: a list where one JSON object"),
        ("x.jsonl", b'{"a": 1}\n"b"\n', "x.jsonl:2: a string where"),
        ("x.jsonl", b'{"a": "\xff"}\n', "x.jsonl:1: invalid UTF-8 at byte 8"),
        ("x.json", b'[{"a": 1}, 3]', "row 2: a number where"),
        ("x.json", b'[{"a": 1},\n {"a": }]', "x.json:2: broken JSON"),
        ("x.json", b'"words"', "holds a string; expected a list"),
        ("x.json", b'["\xff"]', "invalid UTF-8 at byte 3"),
        ("x.csv", b"a,b\n1,2\n3\n", "x.csv:3: 1 cells; expected 2"),
        ("x.csv", b"a,a\n1,2\n", "names 'a' twice"),
        ("x.csv", b'a,b\n1,"2\n', "broken CSV"),
        ("x.csv", b"a,b\n\xff,2\n", "x.csv:2: invalid UTF-8"),
        ("x.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("x.txt", b"words", "ends in '.txt'"),
    ],
)
def test_a_broken_file_gets_one_sentence_with_its_place(write, name, content, says):
    with pytest.raises(DataError) as caught:
        read_file(write(name, content))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_faults_are_told_at_once_with_their_count(write):
    with pytest.raises(DataError) as caught:
        read_file(write("x.jsonl", b"{broken\n" * 8))
    message = str(caught.value)
    assert "has 8 faults" in message
    assert all(f"x.jsonl:{line}:" in message for line in range(1, 6))
    assert "x.jsonl:6:" not in message
    assert message.endswith("and 3 more")
