"""The routes over an engine that answers by script: shapes, fields, limits, errors. No model runs here."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason='the server needs its extra: pip install "lofi[serve]"')

import httpx

from lofi.data.format import TextFormat
from lofi.serve.app import create_app
from lofi.serve.limits import Settings
from lofi.serve.request import Piece, TokenLogprob, UnknownAdapter

HELLO = {"model": "small", "messages": [{"role": "user", "content": "Say hello"}]}
TEXT = {"model": "small", "prompt": "Once"}


def says(*texts, finish="stop", cached=0):
    """A script: one token a text, then the end."""

    def script(asked):
        for place, text in enumerate(texts):
            last = place == len(texts) - 1
            wanted = asked.logprobs
            told = TokenLogprob(token=300 + place, logprob=-0.5, top=((300 + place, -0.5), (7, -2.0))[: wanted or 0])
            yield Piece(
                text=text, tokens=(300 + place,), logprobs=() if wanted is None else (told,),
                finish=finish if last else None, cached=cached if place == 0 else 0,
            )  # fmt: skip

    return script


def ask(service, method, path, body=None, *, settings=None, headers=None, raw=None):
    """One request in this process."""

    async def go():
        transport = httpx.ASGITransport(app=create_app(service, settings or Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            given = {"json": body} if raw is None else {"content": raw}
            if raw is not None:
                headers_ = {"content-type": "application/json", **(headers or {})}
            else:
                headers_ = headers
            return await client.request(method, path, headers=headers_, **(given if method == "POST" else {}))

    return asyncio.run(go())


def chat(service, settings=None, **changes):
    return ask(service, "POST", "/v1/chat/completions", HELLO | changes, settings=settings)


def text(service, settings=None, **changes):
    return ask(service, "POST", "/v1/completions", TEXT | changes, settings=settings)


def sentence(response):
    """The error's sentence, after a look at its shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def test_a_chat_answer_has_openais_shape(scripted):
    found = chat(scripted(says("Hel", "lo", cached=3))).json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-") and found["model"] == "small"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = found["usage"]["prompt_tokens"]
    assert found["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 2, "total_tokens": prompt + 2,
        "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip
    assert found["system_fingerprint"] is None and abs(found["created"] - 1.7e9) < 1e9


def test_a_completion_has_openais_shape_and_sixteen_tokens_unless_it_says(scripted):
    service = scripted(says(" upon", finish="length"))
    found = text(service).json()
    assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    assert found["choices"] == [{"index": 0, "text": " upon", "logprobs": None, "finish_reason": "length"}]
    assert service.engine.asked[0].max_tokens == 16


def test_the_prompt_of_a_chat_is_the_speakers_own_format(scripted, served_tokenizer):
    service = scripted(says("x"))
    chat(service)
    chat(service, messages=[{"role": "system", "content": "Be brief"}, *HELLO["messages"]])
    first, second = service.engine.asked
    assert list(first.prompt) == service.text_format.encode_prompt("Say hello")
    assert "Be brief" in served_tokenizer.decode(second.prompt) and second.stop_ids == tuple(
        service.text_format.stop_ids
    )


def test_a_chat_without_max_tokens_may_use_what_the_context_leaves_up_to_the_servers_bound(scripted):
    service = scripted(says("x"))
    chat(service)
    chat(service, settings=Settings(chat_tokens=9))
    chat(service, max_completion_tokens=5)
    free, bound, said = service.engine.asked
    assert (free.max_tokens, bound.max_tokens, said.max_tokens) == (160 - len(free.prompt), 9, 5)


def test_content_may_come_as_parts_of_text(scripted):
    service = scripted(says("x"))
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]
    chat(service, messages=[{"role": "user", "content": parts}])
    chat(service)
    assert service.engine.asked[0].prompt == service.engine.asked[1].prompt


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("Once", 1),
        (["Once", "Twice"], 2),
        ([5, 6, 7], 1),
        ([[5, 6, 7], [8]], 2),
    ],
)
def test_a_prompt_is_a_text_texts_ids_or_lists_of_ids(scripted, served_tokenizer, prompt, expected):
    service = scripted(says("x"))
    found = text(service, prompt=prompt, n=2).json()
    assert [choice["index"] for choice in found["choices"]] == list(range(2 * expected))
    prompts = [list(asked.prompt) for asked in service.engine.asked]
    if isinstance(prompt, str):
        assert prompts == [served_tokenizer(prompt)["input_ids"]] * 2
    if prompt == [[5, 6, 7], [8]]:
        assert prompts == [[5, 6, 7], [5, 6, 7], [8], [8]]
        assert found["usage"]["prompt_tokens"] == 4


def test_what_a_request_says_of_drawing_reaches_the_engine_and_the_rest_is_the_models(scripted):
    from lofi.serve.request import Drawing

    service = scripted(says("x"), defaults=Drawing(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.1))
    chat(service)
    chat(
        service, temperature=0.2, top_p=0.5, top_k=-1, seed=11, presence_penalty=0.5, frequency_penalty=-1,
        repetition_penalty=1.3, logit_bias={"17": -100, "4": 2.5}, stop=["END", "\n\n"], stop_token_ids=[9],
    )  # fmt: skip
    chat(service, temperature=0)
    own, said, greedy = (asked.drawing for asked in service.engine.asked)
    assert (own.temperature, own.top_p, own.top_k, own.repetition_penalty) == (0.6, 0.95, 20, 1.1)
    assert said == Drawing(
        temperature=0.2, top_p=0.5, top_k=0, seed=11, presence_penalty=0.5, frequency_penalty=-1.0,
        repetition_penalty=1.3, logit_bias=((17, -100.0), (4, 2.5)),
    )  # fmt: skip
    assert service.engine.asked[1].stop == ("END", "\n\n") and 9 in service.engine.asked[1].stop_ids
    assert greedy.temperature == 0 and greedy.seed is None and own.seed is not None


def test_several_answers_draw_with_seeds_of_their_own_and_the_same_ones_again(scripted):
    service = scripted(says("x"))
    for _ in range(2):
        chat(service, n=3, temperature=1.0, seed=5)
    seeds = [asked.drawing.seed for asked in service.engine.asked]
    assert len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:] and seeds[0] == 5


def test_a_servers_seed_decides_what_requests_without_one_draw(scripted):
    seeds = []
    for seed in (1, 1, 2):
        service = scripted(says("x"), seed=seed)
        chat(service, temperature=1.0)
        seeds.append(service.engine.asked[0].drawing.seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_log_probabilities_in_the_chats_shape_spell_tokens_and_bytes(scripted, served_tokenizer):
    found = chat(scripted(says("Hel", "lo")), logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    spelt = served_tokenizer.decode([300])
    first = found["content"][0]
    assert first["token"] == spelt and bytes(first["bytes"]).decode() == spelt and first["logprob"] == -0.5
    assert [one["logprob"] for one in first["top_logprobs"]] == [-0.5, -2.0]


def test_log_probabilities_in_the_completions_shape_count_characters(scripted, served_tokenizer):
    found = text(scripted(says("a", "b")), logprobs=1).json()["choices"][0]["logprobs"]
    names = [served_tokenizer.decode([300]), served_tokenizer.decode([301])]
    assert found["tokens"] == names and found["token_logprobs"] == [-0.5, -0.5]
    assert found["text_offset"] == [0, len(names[0])]
    assert found["top_logprobs"][1] == {names[1]: -0.5}


def test_token_ids_come_when_asked_for(scripted):
    service = scripted(says("a", "b"))
    spoken, written = chat(service, return_token_ids=True).json(), text(service, return_token_ids=True).json()
    assert spoken["choices"][0]["token_ids"] == [300, 301]
    assert spoken["prompt_token_ids"] == list(service.engine.asked[0].prompt)
    assert written["choices"][0]["prompt_token_ids"] == list(service.engine.asked[1].prompt)
    assert "token_ids" not in chat(service).json()["choices"][0]


def test_an_unknown_model_is_404_with_the_nearest_name_and_never_the_base(scripted):
    service = scripted(says("x"))
    response = chat(service, model="smal")
    assert response.status_code == 404 and "did you mean 'small'?" in sentence(response)
    assert response.json()["error"]["code"] == "model_not_found" and not service.engine.asked


REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format is not supported"),
    ({"max_token": 5}, "did you mean max_tokens?"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature is -1"),
    ({"top_p": 0}, "top_p is 0"),
    ({"n": 0}, "n:"),
    ({"n": 65}, "more than 64 answers"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 10**30}, "exceed the context of 160"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "differ"),
    ({"top_logprobs": 3}, "without logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stop": ["x"] * 17}, "17 stop texts"),
    ({"stop": ""}, "stop text is empty"),
    ({"stop": "y" * 513}, "longer than 512"),
    ({"logit_bias": {"x": 1}}, "'x', which is no token id"),
    ({"logit_bias": {"8192": 1}}, "vocabulary ends at 8191"),
    ({"logit_bias": {"5": 101}}, "from -100 to 100"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "1025 entries"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "has no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "'image_url'"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "'tool_calls'"),
    ({"messages": [{"role": "user", "content": "far " * 300}]}, "leave no room"),
    ({"messages": [{"role": "user", "content": "x"}] * 2049}, "at most 2048"),
]


@pytest.mark.parametrize("changes, told", REFUSED, ids=[told[:24] for _, told in REFUSED])
def test_what_cannot_be_answered_as_asked_is_a_400_that_names_it(scripted, changes, told):
    service = scripted(says("x"))
    response = chat(service, **changes)
    assert response.status_code == 400 and told in sentence(response)
    assert not service.engine.asked


def test_a_completions_own_fields_are_checked_too(scripted):
    service = scripted(says("x"))
    for changes, told in (
        ({"prompt": []}, "empty list"),
        ({"prompt": [[]]}, "no token"),
        ({"prompt": [8192]}, "vocabulary ends at 8191"),
        ({"prompt": {"a": 1}}, "expected a text"),
        ({"prompt": ["x"] * 65}, "at most 64"),
        ({"prompt": [5] * 150}, "exceed the context"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True}, "echo is not supported"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
    ):
        response = text(service, **changes)
        assert response.status_code == 400 and told in sentence(response), changes
    assert not service.engine.asked


def test_fields_that_change_nothing_and_neutral_values_are_taken(scripted):
    changes = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "tools": None, "tool_choice": "none", "stream": False,
        "response_format": {"type": "text"}, "logit_bias": {}, "stop": None, "n": None, "parallel_tool_calls": True,
    }  # fmt: skip
    assert chat(scripted(says("x")), **changes).status_code == 200


BAD_BODIES = [
    b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe{}", b'{"model": "\xc3"}', b'{"temperature": NaN}',
    b'{"max_tokens": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 2000 + b"1" + b"}" * 2000,
    b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800"}]}', b'{"model": "small", "prompt": 1e999}',
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bytes_that_are_no_request_are_a_400(scripted, raw):
    service = scripted(says("x"))
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = ask(service, "POST", path, raw=raw)
        assert response.status_code == 400 and sentence(response)


def test_a_body_of_another_type_is_415(scripted):
    response = ask(
        scripted(says("x")),
        "POST",
        "/v1/chat/completions",
        raw=json.dumps(HELLO),
        headers={"content-type": "text/plain"},
    )
    assert response.status_code == 415 and "application/json" in sentence(response)


def test_a_full_queue_is_429_with_the_seconds_to_wait_and_nothing_left_behind(scripted):
    def slow(asked):
        while True:
            yield None

    service = scripted(slow, rows=1, queue=1)
    response = chat(service, n=3)
    assert response.status_code == 429 and response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "queue_full"
    wait_until(lambda: len(service.engine.cancelled) == 2)


def wait_until(condition, seconds=5.0):
    """Wait for another thread; fails after a generous time."""
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@pytest.mark.parametrize(
    "finish, status, told",
    [
        ("error", 500, "the forward failed"),
        ("deadline", 504, "too slow"),
        ("gone", 404, "it was unloaded"),
        ("cancelled", 503, ""),
    ],
)
def test_an_answer_that_did_not_come_to_its_end_is_an_error_and_no_half_answer(scripted, finish, status, told):
    def script(asked):
        yield Piece(text="Hal", tokens=(5,))
        yield Piece(finish=finish, error=told or None)

    response = chat(scripted(script))
    assert response.status_code == status and told in sentence(response) and "Hal" not in response.text


def test_an_engine_that_raises_on_submit_is_a_500_that_says_nothing_of_the_prompt(scripted, caplog):
    service = scripted(says("x"))

    def broken(asked, on_piece):
        raise ValueError("secret words")

    service.engine.submit = broken
    with caplog.at_level("INFO", logger="lofi.serve"):
        response = chat(service, messages=[{"role": "user", "content": "secret words"}])
    assert response.status_code == 500 and "secret" not in response.text
    told = [record.told for record in caplog.records if record.getMessage() == "failed"]
    assert told[0]["error"] == "ValueError" and "broken" in told[0]["at"]
    assert "secret" not in str([vars(record) for record in caplog.records])


def test_a_request_leaves_one_line_without_its_words(scripted, caplog):
    with caplog.at_level("INFO", logger="lofi.serve"):
        response = chat(scripted(says("Hello", "you")), messages=[{"role": "user", "content": "secret words"}])
    (line,) = [record.told for record in caplog.records if record.getMessage() == "request"]
    assert line["route"] == "/v1/chat/completions" and line["status"] == 200 and line["finish"] == "stop"
    assert line["tokens"] == 2 and line["prompt_tokens"] > 2 and line["adapter"] is None and line["ms"] > 0
    assert line["id"] == response.headers["x-request-id"] and "secret" not in str(line) and "Hello" not in str(line)


def test_models_lists_the_base(scripted):
    (base,) = ask(scripted(says("x")), "GET", "/v1/models").json()["data"]
    assert base["id"] == "small" and base["parent"] is None and base["max_model_len"] == 160


def test_routes_in_the_log_and_the_metrics_are_few_whatever_is_asked(scripted):
    service = scripted(says("x"))
    for path in ("/v1/models/a", "/v1/models/b/c", "/x", "/y/../z", "/health"):
        ask(service, "GET", path)
    assert {route for route, _ in service.meters.responses} == {"/v1/models/{name}", "unknown", "/health"}


class Rack:
    """A store with one adapter that was trained in a format of its own."""

    def __init__(self, text_format):
        facts = {"name": "law", "rank": 3, "bytes": 5, "state": "device", "modules": ("q_proj",), "loaded_at": 1.0}
        self.one = SimpleNamespace(**facts, text_format=text_format, key="ab" * 32, folder=Path("runs/law"))

    def held(self):
        return [self.one]

    def get(self, name):
        if name != "law":
            raise UnknownAdapter(name)
        return self.one


@pytest.fixture
def plain(served_tokenizer):
    """The format of an adapter that was trained without the chat template."""
    rule = TextFormat.for_tokenizer(served_tokenizer).to_dict()
    return TextFormat.from_dict(
        {"kind": "plain", "separator": " =>", "template": None} | {"head": rule["head"]}, served_tokenizer
    )


def test_an_adapter_is_spoken_to_in_the_format_it_was_trained_with_and_completions_are_raw(
    scripted, plain, served_tokenizer
):
    service = scripted(says("x"), store=Rack(plain))
    found = chat(service, model="law").json()
    assert found["system_fingerprint"] == "lofi-" + ("ab" * 32)[:16] and found["model"] == "law"
    chat(service, model="law", messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    text(service, model="law")
    one, several, raw = service.engine.asked
    assert [asked.adapter for asked in service.engine.asked] == ["law"] * 3
    assert list(one.prompt) == plain.encode_prompt("Say hello") != service.text_format.encode_prompt("Say hello")
    assert one.stop_ids == tuple(plain.stop_ids) and raw.stop_ids == tuple(dict.fromkeys((1, *plain.stop_ids)))
    assert served_tokenizer.decode(several.prompt) == "System:\ns =>User:\nu =>Assistant:\n"
    assert list(raw.prompt) == served_tokenizer("Once")["input_ids"]


def test_adapters_stand_behind_the_base_in_the_list_of_models_and_in_the_status(scripted, plain):
    service = scripted(says("x"), store=Rack(plain))
    chat(service, model="law")
    base, law = ask(service, "GET", "/v1/models").json()["data"]
    assert (base["id"], law["id"], law["parent"], law["root"]) == ("small", "law", "small", "law")
    (row,) = ask(service, "GET", "/v1/lofi/status").json()["adapters"]
    assert (row["requests"], row["tokens"], row["share"]) == (1, 1, 1.0) and row["modules"] == ["q_proj"]
    assert "did you mean 'law'" in sentence(chat(service, model="laws"))


def test_a_template_that_refuses_the_roles_is_a_400(scripted, served_tokenizer):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    rule = {"kind": "chat", "separator": "\n", "template": template}
    service = scripted(says("x"), text_format=TextFormat.from_dict(rule, served_tokenizer))
    assert chat(service).status_code == 200
    response = chat(service, messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert response.status_code == 400 and "refuses the roles system, user" in sentence(response)


def test_health_and_ready_say_what_the_engine_does(scripted):
    service = scripted(says("x"))
    assert ask(service, "GET", "/health").status_code == ask(service, "GET", "/ready").status_code == 200
    service.engine.draining = True
    assert ask(service, "GET", "/ready").json() == {"status": "draining"}
    assert chat(service).status_code == 503 and ask(service, "GET", "/health").status_code == 200
    service.engine.draining = False
    service.stopping = True
    response = chat(service)
    assert response.status_code == 503 and "retry-after" in response.headers
    assert ask(service, "GET", "/ready").status_code == 503
    service.stopping = False
    service.engine.alive = False
    assert ask(service, "GET", "/health").status_code == 503 and chat(service).status_code == 503


def test_the_status_for_the_page_counts_what_was_answered(scripted):
    service = scripted(says("Hello", "you"))
    chat(service)
    found = ask(service, "GET", "/v1/lofi/status").json()
    assert found["model"] == "small" and found["context"] == 160 and found["admin"] is False
    assert found["engine"]["rows"] == 4 and found["base"] == {"requests": 1, "tokens": 2}
    (last,) = found["requests"]
    assert last["adapter"] is None and last["tokens"] == 2 and last["finish"] == "stop" and last["first_token_ms"] > 0
    assert set(found["latency"]["token_ms"]) == {"p50", "p95", "p99"}


def test_unknown_routes_and_methods_have_openais_error_shape(scripted):
    service = scripted(says("x"))
    missing, wrong = ask(service, "GET", "/v2/models"), ask(service, "GET", "/v1/completions")
    assert missing.status_code == 404 and sentence(missing)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and sentence(wrong)


def test_the_openapi_document_describes_every_body_it_refers_to(scripted):
    document = ask(scripted(says("x")), "GET", "/openapi.json").json()
    text_of = json.dumps(document)
    names = {part.split('"')[0] for part in text_of.split("#/components/schemas/")[1:]}
    assert {"ChatBody", "CompletionBody", "LoadBody", "UnloadBody"} <= names
    assert names <= set(document["components"]["schemas"])


def test_the_page_is_served_at_the_root(scripted):
    response = ask(scripted(says("x")), "GET", "/")
    assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
