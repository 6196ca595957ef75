"""Single tokens as bytes and text, for log probabilities: decoding one token alone loses bytes and leading spaces.

Knows the two spellings that tokenizers have: byte-level (every byte is a printable character; GPT-2) and SentencePiece
(▁ for a space, <0x0A> for a byte). Anything else is decoded as it is. Each token is spelt once. Rejected: decode([id])
(half a character becomes the replacement character, and its bytes are gone).
"""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """The bytes and the text of each token of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _alphabet()
        self._known: dict[int, tuple[bytes, str]] = {}
        self._special = set(tokenizer.all_special_tokens)
        self._byte_level = tokenizer.convert_tokens_to_ids("Ġ") not in (None, tokenizer.unk_token_id)

    def raw(self, token: int) -> bytes:
        """The token's own bytes."""
        return self._look(token)[0]

    def text(self, token: int) -> str:
        """The token as text; `bytes:\\xe4` where its bytes are no whole characters, as OpenAI writes them."""
        return self._look(token)[1]

    def _look(self, token: int) -> tuple[bytes, str]:
        if token not in self._known:
            raw = self._spelt(token)
            try:
                self._known[token] = raw, raw.decode("utf-8")
            except UnicodeDecodeError:
                self._known[token] = raw, "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return self._known[token]

    def _spelt(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id that the model's head has and the tokenizer has not
            return b""
        if piece in self._special:
            return piece.encode("utf-8")
        if self._byte_level:
            if all(character in self._alphabet for character in piece):
                return bytes(self._alphabet[character] for character in piece)
            return piece.encode("utf-8")
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if "▁" in piece:
            return piece.replace("▁", " ").encode("utf-8")
        return self._tokenizer.decode([token]).encode("utf-8")


def _alphabet() -> dict[str, int]:
    """GPT-2's character of every byte, backwards: printable Latin-1 stands for itself, the rest follows from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}
