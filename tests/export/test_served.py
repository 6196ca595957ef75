"""Which model is asked, what is left out when a server refuses, and what its answer is read as."""

from __future__ import annotations

import pytest

from lofi.errors import LofiError, RequestError
from lofi.export.connection import Connection
from lofi.export.served import Reply, Served, read_completion, read_generated
from stub_server import Speaker, serving, speaking


def opened(url, asked=None, usual="first") -> Served:
    return Served.open(Connection(url), asked, usual)


def test_the_adapters_own_name_is_asked_unless_another_is_given(golden):
    with speaking(Speaker(golden)) as url:
        assert opened(url).model == "first"
        assert opened(url, "base").model == "base"


def test_an_unknown_name_is_answered_with_those_there_are(golden):
    with speaking(Speaker(golden)) as url, pytest.raises(RequestError) as caught:
        opened(url, "frist")
    assert "serves no model 'frist', but base, first; did you mean first?" in str(caught.value)
    assert "--endpoint-model" in str(caught.value)


def test_ollamas_tag_need_not_be_written(golden):
    with speaking(Speaker(golden, "ollama", models=("first:latest",))) as url:
        assert (opened(url).model, opened(url).kind) == ("first:latest", "ollama")


def test_llama_cpp_has_one_model_whatever_its_name(golden):
    with speaking(Speaker(golden, "llamacpp", models=("/models/x.gguf",))) as url:
        served = opened(url)
        assert served.model == "/models/x.gguf"
        assert "llama.cpp serves one model" in served.notes[0]
        with pytest.raises(RequestError, match="serves no model 'other'"):
            opened(url, "other")


@pytest.mark.parametrize("listing", [{"models": []}, [], {"data": [{"name": "x"}]}, None])
def test_a_server_of_another_kind_is_not_taken_for_one(listing):
    with serving(lambda *_: (200, listing, {})) as url, pytest.raises(LofiError, match="lists no models"):
        opened(url)


def test_vllm_is_asked_once_a_prompt_with_everything(golden):
    speaker = Speaker(golden)
    with speaking(speaker) as url:
        served = opened(url)
        record = golden["prompts"][0]
        reply = served.complete(record["ids"], None, 4, 5)
    assert list(reply.tokens) == record["output"] and reply.finish == "stop"
    assert list(reply.prompt_ids) == record["ids"]
    assert set(reply.tops[0]) == {token for token, _ in record["top"][0]}
    ((path, body),) = speaker.asked
    assert path == "/v1/completions"
    assert body["prompt"] == record["ids"] and body["temperature"] == 0 and body["logprobs"] == 5
    assert body["max_tokens"] == 4 and "stop_token_ids" not in body


@pytest.mark.parametrize(
    ("style", "requests", "note"),
    [
        ("lofi", 2, None),
        ("plain", 5, "takes no token ids"),
        ("silent", 7, "takes no token ids as a prompt and gives no log probabilities"),
    ],
)
def test_what_a_server_refuses_is_left_out_once_and_told(golden, tokenizer, style, requests, note):
    speaker = Speaker(golden, style, tokenizer)
    with speaking(speaker) as url:
        served = opened(url)
        for record in golden["prompts"]:
            served.complete(record["ids"], tokenizer.decode(record["ids"]), 4, 5)
    assert len(speaker.asked) == requests + 1  # the second prompt is asked as the first was answered
    assert [note in one for one in served.notes] == ([True] if note else [])


def test_a_server_that_refuses_everything_is_quoted_as_it_first_spoke(golden):
    def respond(method, path, body):
        if method == "GET":
            return 200, Speaker(golden).listing(), {}
        return 400, {"error": {"message": "the context is 8 tokens" if "return_token_ids" in body else "no"}}, {}

    with serving(respond) as url, pytest.raises(RequestError, match="the context is 8 tokens"):
        opened(url).complete([1, 2], "text", 4, 5)


def test_both_shapes_of_log_probabilities_are_read():
    old = {"tokens": ["token_id:7"], "token_logprobs": [-1], "top_logprobs": [{"token_id:7": -1, "token_id:9": -2}]}
    new = {
        "content": [{"id": 7, "token": "x", "logprob": -1, "top_logprobs": [{"id": 9, "token": "y", "logprob": -2}]}]
    }
    for shape in (old, new):
        reply = read_completion({"choices": [{"text": "x", "finish_reason": "length", "logprobs": shape}]})
        assert reply == Reply("x", "length", [7], [{7: -1, 9: -2}])
    texts = {"tokens": ["a"], "top_logprobs": [{"a": -1, "token_id:b": -2}]}
    assert read_completion({"choices": [{"text": "a", "logprobs": texts}]}).tokens == ["a"]
    assert read_generated({"response": "hi", "done_reason": "stop"}) == Reply("hi", "stop", None, [])


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{}]}, [], None, {"choices": [{"text": 1}]}])
def test_an_answer_of_another_shape_is_said_to_be_one(answer):
    if answer == {"choices": [{"text": 1}]}:
        assert read_completion(answer).finish is None
        return
    with pytest.raises(LofiError, match="has not OpenAI's shape"):
        read_completion(answer)
