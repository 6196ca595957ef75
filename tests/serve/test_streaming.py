"""Answers as they are written: the chunks, lost clients, ends that are errors, and the crossing of threads."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason='the server needs its extra: pip install "lofi[serve]"')

import httpx

from lofi.serve.app import create_app
from lofi.serve.delivery import Answers, Bridge
from lofi.serve.limits import Settings
from lofi.serve.request import Asked, Piece, TokenLogprob

HELLO = {"model": "small", "messages": [{"role": "user", "content": "Say hello"}], "stream": True}


def pieces(*given):
    return lambda asked: iter(given)


WORDS = pieces(
    Piece(text="Hel", tokens=(5,)),
    Piece(tokens=(6,)),
    Piece(text='lo "ô"\n', tokens=(7,)),
    Piece(finish="stop", tokens=(2,), text="!"),
)


def forever(asked):
    """A word a step, without an end."""
    while True:
        yield Piece(text="x ", tokens=(5,))
        time.sleep(0.001)


def silent(asked):
    """Steps without a piece: a request that waits."""
    while True:
        yield None


def events(service, body, path="/v1/chat/completions"):
    """Every event of a stream as JSON, without the last, which is [DONE]."""

    async def go():
        transport = httpx.ASGITransport(app=create_app(service, Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, json=body)

    response = asyncio.run(go())
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    told = response.text.split("\n\n")
    assert told[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in told[:-2]]


def test_a_chat_streams_its_role_its_text_and_its_end(scripted):
    found = events(scripted(WORDS), HELLO)
    assert [event["choices"][0]["delta"] for event in found] == [
        {"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": 'lo "ô"\n'}, {"content": "!"},
    ]  # fmt: skip
    assert [event["choices"][0]["finish_reason"] for event in found] == [None, None, None, "stop"]
    assert len({event["id"] for event in found}) == 1 and found[0]["object"] == "chat.completion.chunk"
    assert all("usage" not in event for event in found)


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(scripted):
    found = events(scripted(WORDS), HELLO | {"stream_options": {"include_usage": True}})
    assert [event["usage"] for event in found[:-1]] == [None] * 4
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 4


def test_a_completion_streams_text_and_token_ids(scripted):
    body = {"model": "small", "prompt": [5, 6], "stream": True, "return_token_ids": True}
    found = [event["choices"][0] for event in events(scripted(WORDS), body, "/v1/completions")]
    assert "".join(choice["text"] for choice in found) == 'Hello "ô"\n!'
    assert [choice["token_ids"] for choice in found] == [[5], [6], [7], [2]]
    assert found[0]["prompt_token_ids"] == [5, 6] and "prompt_token_ids" not in found[1]


def test_log_probabilities_come_with_their_chunks_and_count_on(scripted, served_tokenizer):
    def told(token):
        return (TokenLogprob(token=token, logprob=-1.0, top=((token, -1.0),)),)

    script = pieces(
        Piece(text="a", tokens=(300,), logprobs=told(300)),
        Piece(text="b", tokens=(301,), logprobs=told(301), finish="length"),
    )
    body = {"model": "small", "prompt": "x", "stream": True, "logprobs": 1}
    found = [event["choices"][0]["logprobs"] for event in events(scripted(script), body, "/v1/completions")]
    assert [one["text_offset"] for one in found] == [[0], [len(served_tokenizer.decode([300]))]]
    spoken = events(scripted(script), HELLO | {"logprobs": True, "top_logprobs": 1})
    assert [len(event["choices"][0]["logprobs"]["content"]) for event in spoken[1:]] == [1, 1]


def test_several_answers_stream_side_by_side_under_their_numbers(scripted):
    found = events(scripted(WORDS), HELLO | {"n": 3})
    for index in range(3):
        mine = [event["choices"][0] for event in found if event["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == 'Hello "ô"\n!'
        assert mine[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("finish, code", [("error", "engine_error"), ("deadline", "deadline")])
def test_a_stream_that_cannot_be_finished_ends_with_an_error_event(scripted, finish, code):
    script = pieces(Piece(text="Hal", tokens=(5,)), Piece(finish=finish, error="it went wrong"))
    found = events(scripted(script), HELLO | {"stream_options": {"include_usage": True}})
    assert found[-1]["error"]["message"] == "it went wrong" and found[-1]["error"]["code"] == code
    assert not any(event.get("usage") for event in found)


def test_what_is_refused_before_the_first_word_has_its_own_status(scripted):
    service = scripted(silent, rows=1, queue=0)

    async def go():
        transport = httpx.ASGITransport(app=create_app(service, Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/v1/chat/completions", json=HELLO | {"n": 2})

    assert asyncio.run(go()).status_code == 429


def test_a_stream_says_something_now_and_then_while_it_waits(scripted, monkeypatch):
    monkeypatch.setattr("lofi.serve.streaming.QUIET_SECONDS", 0.01)

    def late(asked):
        time.sleep(0.08)
        yield Piece(text="x", tokens=(5,), finish="stop")

    service = scripted(late)

    async def go():
        transport = httpx.ASGITransport(app=create_app(service, Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.post("/v1/chat/completions", json=HELLO)).text

    assert ": waiting\n\n" in asyncio.run(go())


# -- a real socket -----------------------------------------------------------------------------------------------------


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def send(url, body):
    """An open connection that has sent a request."""
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    line = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    line.sendall(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return line


@pytest.mark.parametrize(
    "script, changes",
    [(forever, {}), (silent, {}), (forever, {"stream": False}), (forever, {"n": 3})],
    ids=["mid-stream", "waiting", "not streamed", "several answers"],
)
def test_a_client_that_leaves_frees_its_rows(scripted, serving, script, changes):
    service = scripted(script)
    line = send(serving(create_app(service, Settings())), HELLO | changes)
    if script is forever and "stream" not in changes:
        assert b"200 OK" in line.recv(4096)
    wait_until(lambda: service.engine.stats().running == changes.get("n", 1))
    line.close()
    wait_until(lambda: len(service.engine.cancelled) == changes.get("n", 1))
    wait_until(lambda: service.engine.stats().running == 0)
    assert service.meters.finished["base", "cancelled"] == changes.get("n", 1)


def test_what_runs_when_the_server_gives_up_ends_with_an_error_event(scripted, serving):
    service = scripted(forever)
    url = serving(create_app(service, Settings()))
    loop = {}

    def end():
        wait_until(lambda: service.engine.stats().running == 1)
        loop["ended"] = True
        service.bridge_loop.call_soon_threadsafe(service.end_all, "the server is stopping")

    with httpx.stream("POST", url + "/v1/chat/completions", json=HELLO, timeout=20) as response:
        service.bridge_loop = service._bridge.loop
        threading.Thread(target=end).start()
        text = "".join(response.iter_text())
    last = text.split("\n\n")[-3]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
    assert text.endswith("data: [DONE]\n\n") and loop["ended"]
    wait_until(lambda: service.engine.cancelled == [1])


# -- the crossing ------------------------------------------------------------------------------------------------------


class Nobody:
    """An engine that takes requests and leaves the pieces to the test."""

    def submit(self, asked, on_piece):
        return self

    def cancel(self):
        pass


class Count:
    def tokens(self, count, seconds, *, first):
        pass

    def ended(self, choice):
        pass


def test_all_answers_of_a_step_and_of_several_steps_cross_in_one_wake_up():
    async def go():
        bridge = Bridge(asyncio.get_running_loop())
        answers = Answers([Asked(prompt=(1,))] * 16, Count(), streamed=False)
        done = threading.Event()

        def engine():
            for step in range(50):
                for choice in answers.choices:
                    bridge.put(choice, Piece(text="x", tokens=(step,), finish="stop" if step == 49 else None))
            done.set()

        threading.Thread(target=engine).start()
        done.wait(10)  # the loop is busy while the engine runs: everything waits in the box
        await answers.whole()
        return bridge.crossings, [choice.text for choice in answers.choices]

    crossings, texts = asyncio.run(go())
    assert crossings == 1 and texts == ["x" * 50] * 16


def test_what_comes_during_a_pause_is_told_at_once_after_it_and_the_end_at_once():
    async def go(end):
        answers = Answers([Asked(prompt=(1,))], Count(), streamed=True)
        (choice,) = answers.choices
        choice.take(Piece(text="a"))
        found = [len(await answers.news())]
        answers.pause(0.05 if not end else 60)
        for text in "bcd":
            asyncio.get_running_loop().call_soon(choice.take, Piece(text=text))
        if end:
            asyncio.get_running_loop().call_soon(choice.take, Piece(finish="stop"))
        found.append(len(await asyncio.wait_for(answers.news(), 10)))
        return found

    assert asyncio.run(go(end=False)) == [1, 3]
    assert asyncio.run(go(end=True)) == [1, 4]


def test_answers_that_are_wanted_whole_cross_at_their_end_and_know_when_their_tokens_came():
    async def go():
        bridge = Bridge(asyncio.get_running_loop())
        seen = []
        watch = SimpleNamespace(tokens=lambda count, seconds, first: seen.append(seconds), ended=lambda choice: None)
        answers = Answers([Asked(prompt=(1,))], watch, streamed=False)
        (choice,) = answers.choices

        def engine():
            for step in range(4):
                bridge.put(choice, Piece(text="x", tokens=(step,), finish="stop" if step == 3 else None))
                time.sleep(0.03)

        threading.Thread(target=engine).start()
        await answers.whole()
        return bridge.crossings, choice.text, seen

    crossings, text, gaps = asyncio.run(go())
    assert crossings == 1 and text == "xxxx" and len(gaps) == 4 and all(gap > 0.02 for gap in gaps[1:])


def test_no_piece_is_lost_however_the_threads_interleave():
    async def go():
        bridge = Bridge(asyncio.get_running_loop())
        answers = Answers([Asked(prompt=(1,))] * 4, Count(), streamed=True)

        def engine():
            for step in range(2000):
                for choice in answers.choices:
                    bridge.put(choice, Piece(tokens=(step,), finish="stop" if step == 1999 else None))

        threading.Thread(target=engine).start()
        answers.submit(Nobody(), bridge)
        told = 0
        while news := await asyncio.wait_for(answers.news(), 20):
            told += len(news)
            answers.pause(0.001)  # so that the engine looks while pauses begin and end
        return told, [choice.tokens for choice in answers.choices]

    told, tokens = asyncio.run(go())
    assert told == 8000 and tokens == [list(range(2000))] * 4


def test_a_piece_after_the_loop_closed_hurts_nobody():
    async def go():
        bridge = Bridge(asyncio.get_running_loop())
        return bridge, Answers([Asked(prompt=(1,))], Count(), streamed=False)

    bridge, answers = asyncio.run(go())
    bridge.put(answers.choices[0], Piece(text="x"))
    assert answers.choices[0].text == ""
