"""Tokens to text, one at a time: the pieces joined are what decoding all tokens at once gives.

Knows a tokenizer's `decode` and nothing else of it, but for its byte tokens. A piece holds back what later tokens may
still change: the end of an incomplete UTF-8 character, an open run of byte tokens (SentencePiece decodes it as a
whole), the last characters where the tokenizer tidies spaces, and the beginning of a stop text.
Rejected: decoding everything at every token (quadratic); decoding tokens alone (a character may span three).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

_WINDOW, _OVERLAP = 16, 4  # tokens decoded at most while all goes well, and how many of them a new window starts with
_TIDIED = 8  # characters that tidying may still change: its longest pattern is 4
_BROKEN = "\ufffd"


class Vocabulary:
    """A tokenizer as the pieces of all requests need it; a copy of its own, since one thread alone may use one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        known = set(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else set()
        names = [name for byte in range(256) if (name := f"<0x{byte:02X}>") in known]
        self.byte_tokens = frozenset(tokenizer.convert_tokens_to_ids(names)) if names else frozenset()
        self.tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of these ids alone."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)


class Decoding:
    """The text of one answer as its tokens arrive."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = True) -> None:
        self.vocabulary = vocabulary
        self.skip_special = skip_special
        self.ids: list[int] = []  # the window: enough of the last tokens to know how the next ones are written
        self.given = 0  # characters of the window's text that were given out
        self.length = 0  # characters of the window's text
        self.in_bytes = False  # whether the text ends in a run of byte tokens

    def push(self, token: int) -> str:
        """What this token settles; often its own text."""
        self.ids.append(token)
        text = self._text()
        if token in self.vocabulary.byte_tokens or len(text) != self.length:  # skipped tokens do not end a run
            self.in_bytes = token in self.vocabulary.byte_tokens
        self.length = len(text)
        end = max(self.given, self._settled(text))
        new, self.given = text[self.given : end], end
        if len(self.ids) > _WINDOW and end == len(text):
            self._shorten(text)
        return new

    def finish(self) -> str:
        """What was held back."""
        text = self._text()
        new, self.given = text[self.given :], len(text)
        return new

    def _text(self) -> str:
        return self.vocabulary.decode(self.ids, self.skip_special)

    def _settled(self, text: str) -> int:
        """How many characters no later token can change."""
        if self.in_bytes:
            return 0
        if self.vocabulary.tidies:
            return len(text) - _TIDIED
        return len(text) - text.endswith(_BROKEN)  # an incomplete character is written as one of these

    def _shorten(self, text: str) -> None:
        """Start the window later, where its text is still the end of the text."""
        kept = self.ids[-_OVERLAP:]
        tail = self.vocabulary.decode(kept, self.skip_special)
        if tail and text.endswith(tail) and not tail.startswith(_BROKEN) and kept[0] not in self.vocabulary.byte_tokens:
            self.ids, self.given, self.length = kept, len(tail), len(tail)


class Stops:
    """Finds the first of some texts in a text that arrives in pieces."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown, and whether a stop text was completed: the one that is complete first ends the text."""
        if not self.texts:
            return text, False
        text = self.held + text
        found = [(start + len(stop), start) for stop in self.texts if (start := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self.texts)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back: the beginning of a stop text that never came."""
        text, self.held = self.held, ""
        return text


class Text:
    """The shown text of one answer: decoded, and cut before the first stop text."""

    def __init__(self, vocabulary: Vocabulary, *, stop: Sequence[str] = (), skip_special: bool = True) -> None:
        self.decoding = Decoding(vocabulary, skip_special=skip_special)
        self.stops = Stops(stop)

    def push(self, token: int) -> tuple[str, bool]:
        """The text that this token adds to what is shown, and whether it ends the answer."""
        return self.stops.push(self.decoding.push(token))

    def finish(self) -> str:
        """The rest of the text where the answer ends otherwise."""
        shown, ended = self.stops.push(self.decoding.finish())
        return shown if ended else shown + self.stops.finish()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
