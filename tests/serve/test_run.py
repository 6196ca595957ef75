"""A server's life: what it refuses to start with, and `lofi serve` itself as a process that is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason='the server needs its extra: pip install "lofi[serve]"')

import httpx
import uvicorn

from lofi.errors import AdapterFileError, ModelError, RequestError
from lofi.serve.app import create_app
from lofi.serve.limits import Settings
from lofi.serve.request import Piece
from lofi.serve.run import ServeOptions, Server, check_context, open_door, open_service, url_of
from lofi.serve.service import drawing_of, eos_of

SAY = {"model": "lofi-tiny", "messages": [{"role": "user", "content": "How many?"}], "ignore_eos": True}


def test_a_port_in_use_is_refused_before_anything_is_read():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port} of 127.0.0.1 is in use"):
            open_door("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_ours_is_refused(host):
    with pytest.raises(RequestError, match="cannot listen"):
        open_door(host, 0)


def test_a_port_taken_is_not_listened_at_until_the_server_is_ready():
    with contextlib.closing(open_door("127.0.0.1", 0)) as door, pytest.raises(ConnectionRefusedError):
        socket.create_connection(door.getsockname(), timeout=2)


def test_an_answer_in_two_writes_does_not_wait_for_the_clients_acknowledgement():
    """Nagle's algorithm holds the second write back until then: 40 ms an answer where the client delays it."""

    async def go():
        made = asyncio.get_running_loop().create_future()

        class Look(asyncio.Protocol):
            def connection_made(self, transport):
                line = transport.get_extra_info("socket")
                made.set_result(line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        door = open_door("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Look, sock=door)
        with socket.create_connection(door.getsockname()):
            found = await made
        server.close()
        return found

    assert asyncio.run(go()) != 0


def test_the_address_is_one_that_a_browser_takes():
    assert url_of("0.0.0.0", 1) == "http://127.0.0.1:1" and url_of("::1", 2) == "http://[::1]:2"
    assert url_of("example", 3) == "http://example:3"


def test_a_misspelt_adapter_is_named_with_the_nearest_before_the_model_is_read(tmp_path):
    (tmp_path / "first").mkdir()
    options = ServeOptions(model="nowhere", adapters={"law": tmp_path / "frist"})
    with pytest.raises(AdapterFileError, match=r"did you mean .*first\?"):
        open_service(options)


def test_encoders_with_decoders_and_classifiers_are_refused(tmp_path):
    from tiny_training import tiny_bert, tiny_t5

    for model, told in ((tiny_t5(), "encoder-decoder"), (tiny_bert(), "SEQ_CLS model, which writes no text")):
        model.save_pretrained(tmp_path / told[:5])
        with pytest.raises(ModelError, match=told):
            open_service(ServeOptions(model=str(tmp_path / told[:5]), device="cpu"))


def test_an_adapter_that_cannot_be_batched_is_refused_with_what_to_do(served_model, tmp_path):
    import torch

    import lofi

    model = lofi.load_model(str(served_model), dtype="fp32", device="cpu")
    lofi.add_adapter(model, lofi.HoulsbyConfig(bottleneck_size=3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    lofi.save_adapter(model, tmp_path / "deep")
    options = ServeOptions(model=str(served_model), adapters={"deep": tmp_path / "deep"}, dtype="fp32", device="cpu")
    with pytest.raises(RequestError, match=r"cannot share a batch with others.*; ask it with lofi generate"):
        open_service(options)


def test_an_adapter_cannot_have_the_models_name(served_model, served_adapters):
    options = ServeOptions(model=str(served_model), adapters={"small": served_adapters["red"]}, device="cpu")
    with pytest.raises(RequestError, match="the model's own name"):
        open_service(options)


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(RequestError, match="--context is 161, but the model has 160"):
        check_context(161, 160)
    check_context(160, 160)
    check_context(None, 160)
    check_context(5000, None)


def test_the_models_generation_config_decides_where_a_request_does_not():
    plain = drawing_of(SimpleNamespace(do_sample=None, temperature=0.7, repetition_penalty=None))
    assert plain.temperature == 0 and plain.repetition_penalty == 1
    drawn = drawing_of(SimpleNamespace(do_sample=True, temperature=0.6, top_p=0.9, top_k=None, repetition_penalty=1.1))
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.repetition_penalty) == (0.6, 0.9, 0, 1.1)
    assert drawing_of(SimpleNamespace(do_sample=True)).temperature == 1.0
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert eos_of(SimpleNamespace(eos_token_id=[3, 4]), tokenizer) == (3, 4)
    assert eos_of(SimpleNamespace(eos_token_id=3), tokenizer) == (3,)
    assert (
        eos_of(SimpleNamespace(), tokenizer) == (7,)
        and eos_of(SimpleNamespace(), SimpleNamespace(eos_token_id=None)) == ()
    )


@contextlib.contextmanager
def living(service, seconds=5.0, **changes):
    """Our own Server in a thread: (Server, URL)."""
    door = open_door("127.0.0.1", 0)
    config = uvicorn.Config(create_app(service, Settings(**changes)), log_config=None, lifespan="off", ws="none")
    server = Server(config, service, seconds, lambda: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server, f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def silent(asked):
    while True:
        yield None


def test_what_a_dead_engine_leaves_waiting_is_ended(scripted):
    service = scripted(silent)
    with living(service) as (_, url):
        threading.Timer(0.3, lambda: setattr(service.engine, "alive", False)).start()
        found = httpx.post(url + "/v1/chat/completions", json=SAY | {"model": "small"}, timeout=20)
        assert found.status_code == 503 and "the engine stopped" in found.json()["error"]["message"]
        assert httpx.get(url + "/health").status_code == 503


def test_a_connection_that_never_finishes_a_request_is_closed(scripted, monkeypatch):
    monkeypatch.setattr("lofi.serve.run.HEADER_SECONDS", 0.5)
    service = scripted(lambda asked: iter([None] * 900 + [Piece(text="x", tokens=(5,), finish="stop")]))
    with living(service) as (_, url):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=20) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            long = httpx.post(url + "/v1/chat/completions", json=SAY | {"model": "small"}, timeout=20)
            assert slow.recv(100) == b""  # closed, without an answer
        assert long.status_code == 200  # while one that waits for its answer is left alone


def test_the_second_signal_does_not_wait(scripted):
    service = scripted(silent)

    def ask(url):
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(url + "/v1/chat/completions", json=SAY | {"model": "small"})

    with living(service, seconds=60) as (server, url):
        asked = threading.Thread(target=ask, args=(url,))
        asked.start()
        wait_until(lambda: service.engine.stats().running == 1)
        server.handle_exit(signal.SIGINT, None)
        wait_until(lambda: httpx.get(url + "/ready").status_code == 503)
        assert not server.should_exit
        server.handle_exit(signal.SIGINT, None)
        assert server.should_exit and server.force_exit
        service.engine._live.clear()  # so that the thread that drains returns
    asked.join(10)
    assert not asked.is_alive()


def test_an_engine_that_fails_to_drain_does_not_keep_the_server(scripted):
    service = scripted(silent)

    def broken(seconds):
        raise RuntimeError("no")

    service.engine.drain = broken
    with living(service) as (server, _):
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.should_exit)


# -- the process -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(*arguments):
    """`lofi serve` on a free port: (process, URL, its lines on stderr so far); killed at the end if it still runs."""
    command = [sys.executable, "-m", "lofi", "serve", "--port", "0", "--json", "--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(running.stderr), daemon=True)
    reader.start()
    try:
        told = ""
        while (line := running.stdout.readline()) and line != "}\n":
            told += line
        assert line, "".join(lines)
        yield running, json.loads(told + line)["url"], lines
    finally:
        if running.poll() is None:
            running.kill()
        running.wait(10)
        reader.join(10)


def logged(lines, event):
    return [told for line in lines if line.startswith("{") and (told := json.loads(line))["event"] == event]


def stream(url, **changes):
    """The text of a stream, as far as it came."""
    with httpx.stream("POST", url + "/v1/chat/completions", json=SAY | {"stream": True} | changes, timeout=60) as found:
        yield from found.iter_text()


def test_sigterm_lets_a_stream_finish_refuses_new_requests_and_leaves_with_0(lofi_tiny):
    with process("--model", str(lofi_tiny)) as (running, url, lines):
        parts = stream(url, max_tokens=600)
        first = next(parts)
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(url + "/ready").status_code == 503)
        refused = httpx.post(url + "/v1/chat/completions", json=SAY)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert httpx.get(url + "/health").status_code == 200
        text = first + "".join(parts)
        assert running.wait(30) == 0
    assert '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")
    assert logged(lines, "stopped")[0]["unfinished"] == 0
    ends = [told["finish"] for told in logged(lines, "request") if "finish" in told]
    assert ends == ["length"] and "How many" not in "".join(lines)


def test_what_is_not_finished_in_time_ends_with_an_error_event(lofi_tiny):
    with process("--model", str(lofi_tiny), "--drain-seconds", "0") as (running, url, lines):
        parts = stream(url, max_tokens=900)
        text = next(parts)
        running.send_signal(signal.SIGINT)
        text += "".join(parts)
        assert running.wait(30) == 0
    error = json.loads(text.split("\n\n")[-3].removeprefix("data: "))["error"]
    assert "did not finish this answer" in error["message"] and error["type"] == "service_unavailable_error"
    assert text.endswith("data: [DONE]\n\n") and logged(lines, "stopped")[0]["unfinished"] == 1


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
