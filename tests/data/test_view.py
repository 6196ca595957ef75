"""The view: each token's fate readable with and without colour."""

from __future__ import annotations

import io

import pytest

from lofi.data.prepare import prepare
from lofi.data.records import from_rows
from lofi.data.view import chosen, html_fragment, runs, show

ROWS = [
    {"prompt": "short <b>", "completion": "Tiếng Việt"},
    {"prompt": "a very long question " * 20, "completion": "yes"},
    {"prompt": "x", "completion": "no"},
    {"prompt": "y", "completion": "maybe"},
]


@pytest.fixture
def prepared(chat_tokenizer):
    return prepare(from_rows(ROWS), chat_tokenizer, max_length=40)


def shown(prepared, tokenizer, **options):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, **options)
    console.print(show(prepared, tokenizer))
    return console.file.getvalue()


def test_marks_say_what_the_colours_say(prepared, chat_tokenizer):
    text = shown(prepared, chat_tokenizer)
    assert "⟦Tiếng Việt<|im_end|>⟧" in text
    assert "✂⟨" in text
    assert "⟨pad × " in text
    assert "\x1b[" not in text
    assert "EOS trained in 4/4" in text
    assert "rows:row 2 · 40 tokens" in text
    assert "\x1b[" in shown(prepared, chat_tokenizer, force_terminal=True)


def test_the_first_row_and_the_most_cut_are_among_those_shown(prepared):
    assert len(chosen(prepared.examples, 3)) == 3
    assert {0, 1} <= set(chosen(prepared.examples, 3))
    assert chosen(prepared.examples[:2], 3) == [0, 1]


def test_runs_hold_every_token_once(prepared, chat_tokenizer):
    for example in prepared.examples:
        parts = runs(example, chat_tokenizer, padded_to=64)
        assert sum(part.tokens for part in parts) == 64 + len(example.cut)
        assert sum(part.tokens for part in parts if part.fate == "trained") == example.n_trained
        assert sum(part.tokens for part in parts if part.fate == "cut") == len(example.cut)


def test_html_is_escaped(prepared, chat_tokenizer):
    page = html_fragment(prepared, chat_tokenizer)
    assert "short &lt;b&gt;" in page
    assert "<b>" not in page.replace("<p><b>rows", "")
    assert "Tiếng Việt&lt;|im_end|&gt;" in page


def test_an_encoder_decoder_shows_both_sides(plain_tokenizer):
    two_sided = prepare(from_rows(ROWS), plain_tokenizer, task="SEQ_2_SEQ_LM")
    text = shown(two_sided, plain_tokenizer)
    assert "⟦Tiếng Việt<|endoftext|>⟧" in text


def test_classes_show_their_label(chat_tokenizer):
    rows = [{"text": "good", "labels": ["p", "q"]}, {"text": "bad", "labels": []}]
    text = shown(prepare(from_rows(rows), chat_tokenizer), chat_tokenizer)
    assert "label p, q" in text
    assert "label none" in text
