"""The official openai client, unchanged, against a real server with two adapters: sync, async, whole, streamed."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason='the server needs its extra: pip install "lofi[serve]"')
pytest.importorskip("openai")

import httpx
import openai

ASKED = [{"role": "user", "content": "count to three"}]
ROOM = 12


@pytest.fixture(scope="module")
def client(real_server):
    with openai.OpenAI(base_url=real_server[0] + "/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def alone(served_model, served_adapters, served_tokenizer):
    """What `generate` answers alone under each name: ids without the stop token, and text."""
    import lofi
    from lofi.adapters.switch import adapters_off, using
    from lofi.data.format import TextFormat
    from lofi.evaluate.generation import generate
    from lofi.files.adapter_folder import load_adapter

    model = lofi.load_model(str(served_model), dtype="fp32", device="cpu")
    for name, folder in served_adapters.items():
        load_adapter(model, folder, name)
    rule = TextFormat.for_tokenizer(served_tokenizer)
    found = {}
    for name in ("small", "red", "blue"):
        with adapters_off(model) if name == "small" else using(model, name):
            (found[name],) = generate(model, served_tokenizer, rule, [ASKED[0]["content"]], max_new_tokens=ROOM)
    return found


def test_the_models_are_the_base_and_its_adapters(client):
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"small", "red", "blue"}
    assert found["red"].parent == "small" and found["small"].parent is None
    assert client.models.retrieve("red") == found["red"]
    with pytest.raises(openai.NotFoundError, match="did you mean 'blue'"):
        client.models.retrieve("blu")


@pytest.mark.parametrize("name", ["small", "red", "blue"])
def test_an_answer_is_what_generate_says_alone(client, alone, name):
    given = {"model": name, "messages": ASKED, "max_tokens": ROOM, "temperature": 0}
    found = client.chat.completions.create(**given, extra_body={"return_token_ids": True})
    choice = found.choices[0]
    assert choice.message.content == alone[name].text
    assert choice.token_ids[: len(alone[name].ids)] == alone[name].ids
    assert choice.finish_reason == ("stop" if alone[name].stopped else "length")
    assert found.usage.completion_tokens == len(choice.token_ids) and found.usage.prompt_tokens > 3


def test_three_names_give_three_answers(alone):
    assert len({tuple(one.ids) for one in alone.values()}) == 3


def test_a_streamed_answer_is_the_whole_one_in_pieces(client, alone):
    with client.chat.completions.create(
        model="red", messages=ASKED, max_tokens=ROOM, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone["red"].text and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens >= len(alone["red"].ids)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_completions_take_raw_text_and_ids_alike(client, served_tokenizer):
    given = {"model": "blue", "max_tokens": 6, "temperature": 0}
    by_text = client.completions.create(prompt="one two", **given)
    ids = served_tokenizer("one two")["input_ids"]
    by_ids = client.completions.create(prompt=ids, **given)
    several = client.completions.create(prompt=["one two", "three"], **given)
    streamed = client.completions.create(prompt="one two", stream=True, **given)
    assert by_text.choices[0].text == by_ids.choices[0].text == several.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text
    assert by_text.usage.prompt_tokens == len(ids) and len(several.choices) == 2


def test_log_probabilities_agree_with_the_tokens_and_each_other(client):
    given = {"model": "red", "max_tokens": 4, "temperature": 0}
    spoken = client.chat.completions.create(messages=ASKED, logprobs=True, top_logprobs=3, **given)
    content = spoken.choices[0].logprobs.content
    assert len(content) == spoken.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob == max(one.logprob for one in token.top_logprobs) <= 0
    written = client.completions.create(prompt="one two", logprobs=2, **given)
    told = written.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)


def test_the_same_seed_draws_the_same_and_answers_of_one_request_differ(client):
    given = {"model": "red", "messages": ASKED, "max_tokens": 8, "temperature": 1.5, "seed": 3}
    once, again = (client.chat.completions.create(n=2, **given) for _ in range(2))
    texts = [[choice.message.content for choice in found.choices] for found in (once, again)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_a_stop_text_ends_an_answer_before_it(client, alone):
    words = alone["red"].text
    stop = words[len(words) // 2 :][:3]
    found = client.chat.completions.create(model="red", messages=ASKED, max_tokens=ROOM, temperature=0, stop=[stop])
    assert found.choices[0].message.content == words[: words.index(stop)] and found.choices[0].finish_reason == "stop"


def test_the_clients_own_exceptions_say_what_was_wrong(client):
    with pytest.raises(openai.NotFoundError, match="did you mean 'red'"):
        client.chat.completions.create(model="rad", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="temperature is 200"):
        client.chat.completions.create(model="red", messages=ASKED, temperature=200)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model="red", messages=ASKED, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )


def test_many_at_once_are_each_answered_by_their_own_adapter(real_server, alone):
    async def go():
        async with openai.AsyncOpenAI(base_url=real_server[0] + "/v1", api_key="none", max_retries=0) as many:
            names = ["small", "red", "blue"] * 6
            given = {"messages": ASKED, "max_tokens": ROOM, "temperature": 0}

            async def streamed(name):
                stream = await many.chat.completions.create(model=name, stream=True, **given)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def whole(name):
                return (await many.chat.completions.create(model=name, **given)).choices[0].message.content

            made = [(streamed if place % 2 else whole)(name) for place, name in enumerate(names)]
            return names, await asyncio.gather(*made)

    names, texts = asyncio.run(go())
    assert texts == [alone[name].text for name in names]


def test_a_client_that_leaves_mid_stream_frees_its_row(client, real_server):
    service = real_server[1]
    stream = client.chat.completions.create(model="red", messages=ASKED, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_until(lambda: not service.engine._waiting.unanswered)  # its role came before it had a row


def wait_until(condition, seconds=10.0):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_forward_that_fails_is_a_500_or_an_error_event_and_the_next_request_is_answered(client, real_server, alone):
    model = real_server[1].store.bank.model
    given = {"model": "red", "messages": ASKED, "max_tokens": ROOM, "temperature": 0}

    def fail(module, inputs):
        hook.remove()
        raise RuntimeError("out of luck")

    wait_until(lambda: not real_server[1].engine._waiting.unanswered)  # another's forward would fail in place of ours
    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(openai.InternalServerError, match="failed in this step") as told:
        client.chat.completions.create(**given)
    assert told.value.code == "engine_error"
    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(openai.APIError, match="failed in this step"):
        list(client.chat.completions.create(stream=True, **given))
    assert client.chat.completions.create(**given).choices[0].message.content == alone["red"].text


def test_a_full_queue_is_the_clients_rate_limit_error_with_the_seconds_to_wait(client, real_server, monkeypatch):
    monkeypatch.setattr(real_server[1].engine, "queue", -real_server[1].engine.rows)
    with pytest.raises(openai.RateLimitError) as told:
        client.chat.completions.create(model="red", messages=ASKED)
    assert told.value.code == "queue_full" and int(told.value.response.headers["retry-after"]) >= 1


# -- adapters in and out over HTTP -------------------------------------------------------------------------------------

ADMIN = {"Authorization": "Bearer letmein"}


def post(url, path, body, headers=ADMIN):
    return httpx.post(url + path, json=body, headers=headers, timeout=60)


def test_an_adapter_comes_answers_is_counted_and_goes(real_server, client, alone, served_adapters):
    url, _ = real_server
    response = post(url, "/v1/load_lora_adapter", {"lora_name": "third", "lora_path": "red"})
    assert response.text == "Success: LoRA adapter 'third' added successfully." and response.status_code == 200
    given = {"messages": ASKED, "max_tokens": ROOM, "temperature": 0}
    found = client.chat.completions.create(model="third", **given)
    assert found.choices[0].message.content == alone["red"].text
    assert found.system_fingerprint == client.chat.completions.create(model="red", **given).system_fingerprint
    assert found.system_fingerprint != client.chat.completions.create(model="blue", **given).system_fingerprint
    rows = {row["name"]: row for row in httpx.get(url + "/v1/lofi/status").json()["adapters"]}
    assert rows["third"]["requests"] == 1 and rows["third"]["rank"] == 3 and rows["third"]["share"] > 0
    taken = post(url, "/v1/load_lora_adapter", {"lora_name": "third", "lora_path": str(served_adapters["blue"])})
    assert taken.status_code == 409 and "unload it first" in taken.json()["error"]["message"]
    again = {"lora_name": "third", "lora_path": str(served_adapters["blue"]), "load_inplace": True}
    assert post(url, "/v1/load_lora_adapter", again).status_code == 200
    assert client.chat.completions.create(model="third", **given).choices[0].message.content == alone["blue"].text
    assert post(url, "/v1/unload_lora_adapter", {"lora_name": "third"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="third", **given)
    assert post(url, "/v1/unload_lora_adapter", {"lora_name": "third"}).status_code == 404
    metrics = httpx.get(url + "/metrics").text
    assert 'lofi_requests_total{adapter="unloaded",finish="length"}' in metrics and 'adapter="third"' not in metrics


@pytest.fixture
def broken(served_adapters, served_model):
    """Copies of red in the allowed folder, each damaged in its own way; taken away afterwards."""
    import shutil

    from safetensors.torch import load_file, save_file

    root, made = served_adapters["red"].parent, []

    def make(name, *, zero=False, cut=False, base=False):
        folder = root / name
        made.append(folder)
        shutil.copytree(served_adapters["red"], folder)
        tensors = folder / "adapter_model.safetensors"
        if zero:
            save_file({key: value * ("lora_A" in key) for key, value in load_file(tensors).items()}, tensors)
            (folder / "lofi.json").unlink()  # as PEFT writes folders: without the hashes that would tell
        if cut:
            tensors.write_bytes(tensors.read_bytes()[:-100])
        if base:
            shutil.rmtree(folder)
            save_on_another_base(served_model, folder)
        return name

    yield make
    for folder in made:
        shutil.rmtree(folder)


def save_on_another_base(model_folder, folder):
    """The folder of an adapter that was trained on a base whose weights are others."""
    import torch

    import lofi

    model = lofi.load_model(str(model_folder), dtype="fp32", device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    lofi.save_adapter(model, folder)


@pytest.mark.parametrize(
    ("damage", "status"),
    [({"zero": True}, 409), ({"cut": True}, 400), ({"base": True}, 409)],
    ids=["dead", "cut", "base"],
)
def test_an_adapter_that_is_dead_damaged_or_another_bases_is_refused_and_nothing_changes(
    real_server, broken, damage, status
):
    url, service = real_server
    before = service.states()
    response = post(url, "/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": broken("bad", **damage)})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"].count(". ") == 0 and set(service.states()) == set(before)
