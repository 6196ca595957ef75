"""What the engine has done, counted as it goes; read from any thread."""

from __future__ import annotations

import time
from collections import deque
from typing import get_args

from lofi.serve.request import Finish

_SECONDS = 10


class Counters:
    """Running totals, and how fast the last ten seconds were."""

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.finished: dict[str, int] = dict.fromkeys(get_args(Finish), 0)
        self.seconds_each = 1.0
        """How long an answer took lately, from its row to its end."""
        self._begun = time.monotonic()
        self._recent: deque[tuple[int, int]] = deque(maxlen=_SECONDS + 1)  # (second, tokens in it)

    def generated(self, tokens: int) -> None:
        """So many tokens in this step."""
        self.steps += 1
        self.generated_tokens += tokens
        second = int(time.monotonic())
        if self._recent and self._recent[-1][0] == second:
            tokens += self._recent.pop()[1]
        self._recent.append((second, tokens))

    def ended(self, finish: str, seconds: float | None = None) -> None:
        """An answer ended, after so many seconds in a row of the cache."""
        self.finished[finish] += 1
        if seconds is not None:
            self.seconds_each += (seconds - self.seconds_each) / 8

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, over the last ten seconds or since the start."""
        now = time.monotonic()
        recent = sum(tokens for second, tokens in list(self._recent) if second > now - _SECONDS - 1)
        return recent / max(1.0, min(_SECONDS, now - self._begun))
