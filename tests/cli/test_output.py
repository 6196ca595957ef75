"""stdout under --json holds one object and nothing else, whoever else prints."""

from __future__ import annotations

import json

import pytest

from lofi.cli.output import print_json, speaking


def test_what_a_library_prints_goes_to_stderr_under_json(capsys):
    with speaking(True) as out:
        print("a library's chatter")
        out.show("for people")
        out.note("progress")
        out.answer({"a": 1})
    seen = capsys.readouterr()
    assert json.loads(seen.out) == {"a": 1}
    assert "chatter" in seen.err
    assert "progress" in seen.err
    assert "for people" not in seen.out + seen.err


def test_for_people_the_answer_is_shown_and_markup_is_left_alone(capsys):
    with speaking(False) as out:
        out.show("a [bold] move: đáp")
        out.answer({"a": 1})
    assert capsys.readouterr().out == "a [bold] move: đáp\n"


def test_nothing_is_printed_where_the_verb_failed(capsys):
    with pytest.raises(ValueError, match="broken"), speaking(True) as out:
        out.answer({"a": 1})
        raise ValueError("broken")
    assert capsys.readouterr().out == ""


def test_numbers_that_json_does_not_have_become_null_and_letters_stay(capsys):
    print_json({"đáp": [float("nan"), (1.5, float("inf"))], 3: None})
    text = capsys.readouterr().out
    assert "đáp" in text
    assert json.loads(text) == {"đáp": [None, [1.5, None]], "3": None}
