"""Text in pieces: joined they are what decoding everything at once gives, and a stop text is never shown."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi.serve.text import Decoding, Stops, Text, Vocabulary

WORDS = [
    "the", "cat's", "paw,", "don't", "!", "Tiếng", "Việt", "rất", "đẹp.", "你好，世界", "🙂👩\u200d👧", "naïve",
    "Ωμέγα", "x=1;\n\tend", "'", "quoted", "it's",
]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(model, decoder, pre=None, **settings):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(model)
    made.decoder = decoder
    if pre is not None:
        made.pre_tokenizer = pre
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **settings)
    found.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return found


def byte_level():
    """Every byte is a token, and so are some pairs of bytes that are no characters."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"[UNK]": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    pairs = [(a, b) for a in alphabet[::7] for b in alphabet[::5]]
    vocabulary |= {a + b: len(alphabet) + 1 + i for i, (a, b) in enumerate(pairs) if a + b not in vocabulary}
    return fast(models.BPE(vocabulary, pairs), decoders.ByteLevel())


def sentencepiece():
    """Words that begin with a bar, and bytes for everything else, decoded as a run."""
    from tokenizers import decoders, models

    words = ["[UNK]", "▁", *dict.fromkeys(f"▁{word}" for word in WORDS), *dict.fromkeys(w for w in WORDS if w), *BYTES]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    bar = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return fast(models.BPE(vocabulary, [], unk_token="[UNK]", byte_fallback=True), decoders.Sequence(bar))


def word_piece():
    """Words and their later parts, with the spaces before punctuation tidied away."""
    from tokenizers import decoders, models

    parts = ["[UNK]", "do", "it", "a", "'", "s", "n", "t", "ve", "re", "m", ".", ",", "!", "?", "##n", "##t", "##'"]
    vocabulary = {part: i for i, part in enumerate(parts)}
    return fast(
        models.WordPiece(vocabulary, unk_token="[UNK]"), decoders.WordPiece(cleanup=False),
        clean_up_tokenization_spaces=True,
    )  # fmt: skip


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece, "word-piece": word_piece}


@cache
def known(kind: str) -> Vocabulary:
    return Vocabulary(KINDS[kind]())


def pieces(decoding: Decoding, ids) -> list[str]:
    return [*(decoding.push(token) for token in ids), decoding.finish()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 120), narrow=st.booleans())
def test_pieces_of_any_tokens_join_to_their_text(kind, skip, seed, length, narrow):
    vocabulary, dice = known(kind), random.Random(seed)
    size = len(vocabulary.tokenizer)
    some = [dice.randrange(size) for _ in range(6 if narrow else size)]
    ids = [dice.choice(some) for _ in range(length)]
    expected = vocabulary.tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(Decoding(vocabulary, skip_special=skip), ids)) == expected


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_character_is_shown_whole_or_not_yet(kind):
    vocabulary = known(kind)
    text = "đẹp 🙂 你好 👩‍👧"
    raw = text.encode()
    if kind == "byte-level":
        from tokenizers import pre_tokenizers

        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ids = vocabulary.tokenizer.convert_tokens_to_ids(list(level.pre_tokenize_str(text)[0][0]))
    else:
        ids = vocabulary.tokenizer.convert_tokens_to_ids([BYTES[byte] for byte in raw])
    assert len(ids) == len(raw)
    shown = pieces(Decoding(vocabulary), ids)
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


def test_text_flows_and_the_window_stays_short():
    vocabulary = known("byte-level")
    ids = vocabulary.tokenizer.convert_tokens_to_ids(list("abcdefgh" * 40))
    decoding = Decoding(vocabulary)
    for token in ids:
        assert decoding.push(token)  # nothing is held back without need
        assert len(decoding.ids) <= 17


def test_the_tokenizer_of_the_model_that_ships(lofi_tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lofi_tiny)
    vocabulary, dice = Vocabulary(tokenizer), random.Random(0)
    for _ in range(60):
        ids = [dice.randrange(len(tokenizer)) for _ in range(dice.randrange(1, 90))]
        assert "".join(pieces(Decoding(vocabulary), ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def cut(text: str, stops) -> str:
    """The text before the stop that is complete first, by definition."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@settings(deadline=None)
@given(
    text=st.text("abc\n", max_size=40),
    stops=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3),
    borders=st.lists(st.integers(0, 40), max_size=12),
)
def test_a_stop_text_ends_the_answer_wherever_pieces_end(text, stops, borders):
    search, shown, ended = Stops(stops), "", False
    marks = sorted({0, len(text), *(border for border in borders if border < len(text))})
    for start, end in pairwise(marks):
        piece, ended = search.push(text[start:end])
        shown += piece
        assert not any(stop in shown for stop in stops)
        if ended:
            break
    if not ended:
        shown += search.finish()
    assert ended == any(stop in text for stop in stops)
    whole = cut(text, stops)
    assert shown == whole or (ended and len(stops) > 1 and text.startswith(shown))
    if len(marks) - 1 == len(text) or len(stops) < 2:  # letter by letter, the one that is complete first is seen first
        assert shown == whole


def test_only_what_may_begin_a_stop_text_is_held_back():
    search = Stops(["\n\nUser:", "END"])
    assert search.push("hello") == ("hello", False)
    assert search.push(" you\n") == (" you", False)
    assert search.push("\nUse") == ("", False)
    assert search.push("d E") == ("\n\nUsed ", False)
    assert search.push("N") == ("", False)
    assert search.finish() == "EN"


def test_a_stop_text_across_tokens_ends_the_text_before_it():
    vocabulary = known("byte-level")
    letters = lambda text: vocabulary.tokenizer.convert_tokens_to_ids(list(text))  # noqa: E731
    text, shown = Text(vocabulary, stop=["xyz"]), ""
    for token in letters("abxyxyzcd"):
        piece, ended = text.push(token)
        shown += piece
        if ended:
            break
    assert shown == "abxy"


def test_a_stop_text_in_what_was_held_back_is_not_shown_either():
    vocabulary = known("sentencepiece")
    ids = vocabulary.tokenizer.convert_tokens_to_ids([BYTES[byte] for byte in b"ab!c"])
    text = Text(vocabulary, stop=["!"])
    assert [text.push(token) for token in ids] == [("", False)] * 4  # bytes are a run until something else comes
    assert text.finish() == "ab"


def test_a_special_token_that_is_not_shown_does_not_end_a_run_of_bytes():
    vocabulary = known("sentencepiece")
    ids = vocabulary.tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<|im_end|>", "<0xAC>", "the"])
    assert pieces(Decoding(vocabulary), ids) == ["", "", "", "", "€the", ""]
