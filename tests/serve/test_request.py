"""What may be asked of the engine, and the sentence where it may not."""

from __future__ import annotations

import pytest

from lofi.errors import RequestError
from lofi.serve.request import Asked, Drawing, Piece, check

FINE = {"prompt": (3, 4, 5), "max_tokens": 7}


def checked(*, context=10, vocabulary=50, **changes):
    drawing = Drawing(**changes.pop("drawing", {}))
    check(Asked(**(FINE | changes), drawing=drawing), context=context, vocabulary=vocabulary)


def test_a_request_that_just_fits_is_taken():
    checked()
    checked(context=None, max_tokens=10**6)
    checked(drawing={"temperature": 2.0, "top_p": 0.1, "top_k": 5, "logit_bias": ((49, -3.0),), "presence_penalty": -2})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ()}, "no token"),
        ({"prompt": (3, 50)}, "holds token 50, but the vocabulary ends at 49"),
        ({"prompt": (-1,)}, "holds token -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 8}, "3 prompt tokens and max_tokens=8 exceed the context of 10"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"stop": ("x", "")}, "stop text is empty"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 51}, "logprobs is 51"),
        ({"drawing": {"temperature": -0.1}}, "temperature is -0.1"),
        ({"drawing": {"temperature": float("nan")}}, "temperature is nan"),
        ({"drawing": {"top_p": 0.0}}, "top_p is 0"),
        ({"drawing": {"top_p": 1.1}}, "top_p is 1.1"),
        ({"drawing": {"top_k": -1}}, "top_k is -1"),
        ({"drawing": {"presence_penalty": 2.5}}, "presence_penalty is 2.5"),
        ({"drawing": {"frequency_penalty": -2.5}}, "frequency_penalty is -2.5"),
        ({"drawing": {"repetition_penalty": 0.0}}, "repetition_penalty is 0.0"),
        ({"drawing": {"repetition_penalty": float("inf")}}, "repetition_penalty is inf"),
        ({"drawing": {"logit_bias": ((50, 1.0),)}}, "logit_bias holds token 50"),
        ({"drawing": {"logit_bias": ((4, float("nan")),)}}, "logit_bias of token 4 is nan"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(changes, words):
    with pytest.raises(RequestError, match=words.replace("(", r"\(")):
        checked(**changes)


def test_all_faults_are_said_at_once():
    with pytest.raises(RequestError) as caught:
        checked(max_tokens=0, prompt=(99,), drawing={"top_k": -3})
    assert all(word in str(caught.value) for word in ("max_tokens", "token 99", "top_k"))


def test_pieces_are_values():
    assert Piece(text="a") == Piece(text="a") != Piece(text="a", finish="stop")
