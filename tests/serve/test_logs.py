"""Lines on stderr: one JSON object each, and never the message of an exception."""

from __future__ import annotations

import json
import logging

import pytest

from lofi.serve.logs import log, logger, to_stderr


@pytest.fixture
def restored():
    """The loggers as they were, afterwards."""
    found = [(one, one.handlers[:], one.level, one.propagate) for one in (logger, logging.getLogger("uvicorn.error"))]
    yield
    for one, handlers, level, propagate in found:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def test_a_line_is_one_json_object_with_what_was_told(restored, capsys):
    to_stderr("info")
    log(logging.INFO, "request", status=200, adapter="đỏ\n")
    log(logging.DEBUG, "quiet")
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told["event"] == "request" and told["status"] == 200 and told["adapter"] == "đỏ\n"
    assert told["level"] == "info" and told["time"].endswith("Z")


def test_an_exception_is_told_by_type_and_place_and_not_by_its_message(restored, capsys):
    to_stderr("error")
    try:
        raise ValueError("secret words of a prompt")
    except ValueError:
        logger.exception("a step failed")
    told = json.loads(capsys.readouterr().err)
    assert told["error"] == "ValueError" and "test_logs.py" in told["at"] and "secret" not in str(told)


def test_warnings_of_the_library_below_come_the_same_way_and_its_chatter_does_not(restored, capsys):
    to_stderr("debug")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "Invalid HTTP request received."
