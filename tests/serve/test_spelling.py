"""Single tokens as bytes and text, for the two ways in which tokenizers write them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lofi.serve.spelling import Spelling


class Pieces:
    """A tokenizer of these pieces; ids are their places."""

    def __init__(self, *pieces, special=()):
        self.pieces, self.all_special_tokens, self.unk_token_id = pieces, list(special), 0

    def convert_ids_to_tokens(self, token):
        return self.pieces[token] if token < len(self.pieces) else None

    def convert_tokens_to_ids(self, piece):
        return self.pieces.index(piece) if piece in self.pieces else 0

    def decode(self, ids):
        return f"decoded {self.pieces[ids[0]]}"


def test_byte_level_pieces_are_their_bytes_even_where_they_are_half_a_character():
    spelling = Spelling(Pieces("<unk>", "Ġ", "Ġhello", "Ã", "¡»", "Ċ", "<end>", special=["<unk>", "<end>"]))
    assert [spelling.text(token) for token in (2, 5, 6)] == [" hello", "\n", "<end>"]
    assert spelling.raw(3) + spelling.raw(4)[:1] == "á".encode()
    assert spelling.text(3) == "bytes:\\xc3" and spelling.raw(3) == b"\xc3"


def test_sentencepiece_pieces_keep_their_space_and_byte_pieces_are_bytes():
    spelling = Spelling(Pieces("<unk>", "▁hello", "<0xC3>", "<0x0A>", "rest", special=["<unk>"]))
    assert spelling.text(1) == " hello" and spelling.raw(2) == b"\xc3" and spelling.text(3) == "\n"
    assert spelling.text(4) == "decoded rest"


def test_an_id_that_the_head_has_and_the_tokenizer_has_not_is_empty():
    assert Spelling(Pieces("<unk>")).text(9) == ""


def test_a_real_tokenizers_tokens_join_to_its_text(lofi_tiny):
    from lofi.models.load import load_tokenizer

    tokenizer = load_tokenizer(lofi_tiny)
    spelling = Spelling(tokenizer)
    text = "Có bao nhiêu thành phố? 10 > 9\n🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(spelling.raw(token) for token in ids).decode() == text


@pytest.mark.parametrize("unknown", [None, 0])
def test_a_tokenizer_without_the_letter_of_a_space_is_not_byte_level(unknown):
    bare = SimpleNamespace(
        all_special_tokens=[], unk_token_id=0, convert_tokens_to_ids=lambda piece: unknown,
        convert_ids_to_tokens=lambda token: "Ġ", decode=lambda ids: "as it is",
    )  # fmt: skip
    assert Spelling(bare).text(1) == "as it is"
