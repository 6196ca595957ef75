"""One JSON line a request on stderr: who was asked, how long it took, how it ended. Never a prompt, never an answer.

Knows the standard logging. What the libraries below say goes the same way. An exception is told by its type and the
place it came from: its message may hold a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("lofi.serve")


class JsonLines(logging.Formatter):
    """Every record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """{"time", "level", "event", ...}."""
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "told", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            told |= place_of(record.exc_info[1])
        return json.dumps(told, ensure_ascii=False, default=str)


def place_of(error: BaseException) -> dict[str, str]:
    """An exception's type and where it was raised, innermost last; without its message."""
    found, step = [], error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        found.append(f"{code.co_filename.rpartition('/')[2]}:{step.tb_lineno} {code.co_name}")
        step = step.tb_next
    return {"error": type(error).__name__, "at": " > ".join(found[-6:])}


def log(level: int, event: str, **told: Any) -> None:
    """One line; nothing is made of it where the level is not wanted."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"told": told})


def to_stderr(level: str) -> None:
    """Send the server's lines, and uvicorn's warnings, to stderr from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    quietest = getattr(logging, level.upper())
    for name, least in (("lofi.serve", quietest), ("uvicorn.error", max(quietest, logging.WARNING))):
        one = logging.getLogger(name)
        one.handlers[:] = [handler]
        one.setLevel(least)
        one.propagate = False
