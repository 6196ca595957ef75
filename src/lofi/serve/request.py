"""What the engine is asked and what it answers: plain values, no tensors, no HTTP.

The engine turns one `Asked` into a stream of `Piece`s; the last one says how it ended. Whoever asks gives a callback,
which the engine's thread calls once a step and which must not block. Imports no torch, so the app can be described
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lofi.errors import LofiError, RequestError

Finish = Literal["stop", "length", "cancelled", "deadline", "gone", "error"]
"""How an answer ends; "gone": its adapter was unloaded before its turn came."""


class Overloaded(LofiError):
    """The queue is full; `retry_after` says in how many seconds to come back."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(LofiError):
    """The server is stopping and takes no new request."""


class UnknownAdapter(RequestError):
    """No adapter has this name; the base never answers in its place."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the next token is chosen: greedy at temperature 0, else drawn; penalties act on the scores before."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """How many of the likeliest tokens stay in the draw; 0 keeps all."""
    seed: int | None = None
    """The same seed and request give the same draw whatever else is in the batch; None draws one."""
    presence_penalty: float = 0.0
    """Taken off the score of every token that the answer already holds, once (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """Taken off the score of a token as often as the answer already holds it."""
    repetition_penalty: float = 1.0
    """Scores of tokens in prompt or answer are divided by it where positive, else multiplied (CTRL, 1909.05858)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its score)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request for one continuation."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    adapter: str | None = None
    """An adapter's name; None is the base."""
    max_tokens: int = 256
    drawing: Drawing = field(default_factory=Drawing)
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer and are not part of its text."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; the text stops before the first of them."""
    logprobs: int | None = None
    """With every token its log probability and those of this many likeliest tokens (0: its own alone)."""
    timeout: float | None = None
    """Seconds from submission until the answer is ended with "deadline"; None waits as long as it takes."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One generated token with its log probability under the unpenalised, untempered distribution."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step adds to one answer; text may lag behind while a stop text or a character is incomplete."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    """Ids generated in this step; the stop token is counted among them though its text is not shown."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    """Set on the last piece of an answer, and only there."""
    error: str | None = None
    """One sentence where finish is "error", "gone" or "deadline"."""
    cached: int = 0
    """On the first piece: prompt tokens whose keys and values were taken from an earlier request."""


OnPiece = Callable[[Piece], Any]
"""Called in the engine's thread, once a step at most; must return at once and may not raise."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The engine at one moment."""

    running: int = 0
    waiting: int = 0
    rows: int = 0
    """The most requests that run at once."""
    queue: int = 0
    """The most requests that wait."""
    cache_tokens: int = 0
    """Positions of keys and values in use."""
    cache_capacity: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """How many answers ended in each way."""
    tokens_per_second: float = 0.0
    """Generated tokens over the last ten seconds."""
    draining: bool = False
    threads: int = 0
    """How many of torch's threads a step takes."""


def check(asked: Asked, *, context: int | None, vocabulary: int) -> None:
    """RequestError where a request cannot be answered as asked: one sentence with what to change."""
    faults = [*_length_faults(asked, context), *_logprob_faults(asked, vocabulary)]
    faults += [*_drawing_faults(asked.drawing), *_id_faults(asked, vocabulary)]
    if faults:
        raise RequestError("; ".join(faults))


def _length_faults(asked: Asked, context: int | None) -> list[str]:
    found = []
    if not asked.prompt:
        found.append("the prompt has no token: give at least one")
    if asked.max_tokens < 1:
        found.append(f"max_tokens is {asked.max_tokens}: ask for at least 1")
    elif context is not None and len(asked.prompt) + asked.max_tokens > context:
        found.append(
            f"{len(asked.prompt)} prompt tokens and max_tokens={asked.max_tokens} exceed the context of {context}: "
            "shorten the prompt or lower max_tokens"
        )
    if asked.timeout is not None and not asked.timeout > 0:
        found.append(f"timeout is {asked.timeout}: give seconds above 0")
    if any(not text for text in asked.stop):
        found.append("a stop text is empty: leave it out")
    return found


def _logprob_faults(asked: Asked, vocabulary: int) -> list[str]:
    if asked.logprobs is None or 0 <= asked.logprobs <= vocabulary:
        return []
    return [f"logprobs is {asked.logprobs}: give how many likeliest tokens to list, from 0 to {vocabulary}"]


def _drawing_faults(drawing: Drawing) -> list[str]:
    ranges = (
        ("temperature", 0, 100), ("top_p", 0, 1), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)
    )  # fmt: skip
    found = [
        f"{name} is {getattr(drawing, name)}: give a number from {low} to {high}"
        for name, low, high in ranges
        if not low <= getattr(drawing, name) <= high
    ]
    if drawing.top_p == 0:
        found.append("top_p is 0: give a share above 0")
    if drawing.top_k < 0:
        found.append(f"top_k is {drawing.top_k}: give the number of tokens to keep, or 0 for all")
    if not 0 < drawing.repetition_penalty <= 100:
        found.append(f"repetition_penalty is {drawing.repetition_penalty}: give a number above 0, at most 100")
    strange = [(token, value) for token, value in drawing.logit_bias if not abs(value) <= 1000]
    if strange:
        found.append(f"the logit_bias of token {strange[0][0]} is {strange[0][1]}: give a number from -1000 to 1000")
    return found


def _id_faults(asked: Asked, vocabulary: int) -> list[str]:
    places: tuple[tuple[str, Sequence[int]], ...] = (
        ("prompt", asked.prompt),
        ("logit_bias", [token for token, _ in asked.drawing.logit_bias]),
    )
    return [
        f"the {where} holds token {wrong[0]}, but the vocabulary ends at {vocabulary - 1}"
        for where, ids in places
        if (wrong := [token for token in ids if not 0 <= token < vocabulary])
    ]
