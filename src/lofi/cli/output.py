"""Where a verb's words go: people's answer or one JSON object on stdout, progress on stderr.

Under --json everything that prints, libraries too, goes to stderr while the verb runs: stdout holds the object alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

WIDTH_WITHOUT_TERMINAL = 120  # tables in a file or a pipe


class Output:
    """One verb's voice: `note` for progress, `show` for people, `answer` for the object that --json prints."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.object: dict[str, Any] | None = None

    def note(self, text: str) -> None:
        """A line of progress, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def show(self, *renderables: Any) -> None:
        """Text or rich renderables for people, on stdout; nothing under --json."""
        if self.as_json:
            return
        console = people_console()
        for item in renderables:
            console.print(item, highlight=False, markup=False, soft_wrap=isinstance(item, str))

    def answer(self, answer: dict[str, Any]) -> None:
        """The object for --json."""
        self.object = answer


@contextlib.contextmanager
def speaking(as_json: bool) -> Iterator[Output]:
    """An Output; under --json stdout is stderr inside the block, and the answer is printed when the block ends well."""
    output = Output(as_json)
    if not as_json:
        yield output
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield output
    print_json(output.object or {})


def people_console() -> Any:
    """A rich console on stdout; wide enough for a table where stdout is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)


def print_json(answer: dict[str, Any]) -> None:
    """One JSON object on stdout; a number that is not finite becomes null, for JSON has none."""
    print(json.dumps(_finite(answer), ensure_ascii=False, indent=2, default=str), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
