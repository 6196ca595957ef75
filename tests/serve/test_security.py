"""Who may come in, what may be opened, how much may be sent; and fuzzing from the server's own OpenAPI document."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct

import pytest

pytest.importorskip("fastapi", reason='the server needs its extra: pip install "lofi[serve]"')

import httpx

from lofi.errors import AdapterFileError
from lofi.serve.allowed import allowed_folder, tensor_count
from lofi.serve.app import create_app
from lofi.serve.faults import Refused
from lofi.serve.limits import LOOPBACK, Settings
from lofi.serve.request import Piece
from lofi.serve.run import hosts_of
from lofi.serve.security import name_of

HELLO = {"model": "small", "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 3}
ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/lofi/status")
]  # fmt: skip


def short(asked):
    yield Piece(text="x", tokens=(5,), finish="stop")


class Shelf:
    """A store of names; it remembers what it was asked to open."""

    def __init__(self, *names):
        self.names, self.opened = set(names), []

    def held(self):
        return []

    def get(self, name):
        from lofi.serve.request import UnknownAdapter

        raise UnknownAdapter(name)

    def load(self, name, folder, *, replace):
        self.opened.append(folder)
        raise AdapterFileError("this shelf holds nothing")


def ask(service, settings, method, path, *, headers=None, body=None, raw=None):
    async def go():
        transport = httpx.ASGITransport(app=create_app(service, settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            given = {} if method == "GET" else {"json": body if body is not None else HELLO}
            if raw is not None:
                given = {"content": raw}
            return await client.request(method, path, headers=headers, **given)

    return asyncio.run(go())


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


# -- who may come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_with_an_api_key_every_v1_route_asks_for_it(scripted, method, path):
    service, settings = scripted(short), Settings(api_key="right-key", admin_token="boss")
    wrong = [None, {"Authorization": "right-key"}, {"Authorization": "Basic right-key"}, bearer(""), bearer("right-ke"),
             bearer("right-key2"), bearer("RIGHT-KEY")]  # fmt: skip
    for headers in wrong:
        response = ask(service, settings, method, path, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert not service.engine.asked
    for token in ("right-key", "boss"):
        assert ask(service, settings, method, path, headers=bearer(token)).status_code != 401


def test_two_authorization_headers_are_none(scripted):
    settings = Settings(api_key="right")
    headers = [("Authorization", "Bearer right"), ("Authorization", "Bearer right")]
    assert ask(scripted(short), settings, "GET", "/v1/models", headers=headers).status_code == 401


def test_a_key_with_letters_beyond_ascii_is_compared_as_its_bytes(scripted):
    settings = Settings(api_key="mật-khẩu")
    good = [(b"Authorization", "Bearer mật-khẩu".encode())]
    assert ask(scripted(short), settings, "GET", "/v1/models", headers=good).status_code == 200
    bad = [(b"Authorization", "Bearer mật".encode() + b"\xff")]
    assert ask(scripted(short), settings, "GET", "/v1/models", headers=bad).status_code == 401


def test_health_and_the_page_are_open_and_say_nothing_of_the_model(scripted):
    service, settings = scripted(short), Settings(api_key="right")
    for path in ("/health", "/ready", "/"):
        response = ask(service, settings, "GET", path)
        assert response.status_code == 200 and "small" not in response.text


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_loading_and_unloading_ask_for_the_admin_token_and_are_off_without_one(scripted, path, tmp_path):
    body = {"lora_name": "a"} | ({"lora_path": "a"} if path.endswith("/load_lora_adapter") else {})
    service = scripted(short, store=Shelf())
    off = ask(service, Settings(adapter_folder=tmp_path), "POST", path, body=body, headers=bearer("boss"))
    assert off.status_code == 403 and "--admin-token" in off.json()["error"]["message"]
    settings = Settings(api_key="right", admin_token="boss", adapter_folder=tmp_path)
    statuses = [
        ask(service, settings, "POST", path, body=body, headers=headers).status_code
        for headers in (None, bearer("wrong"), bearer("right"), bearer("boss"))
    ]
    assert statuses == [401, 401, 403, 404]
    assert not service.store.opened


def test_without_an_allowed_folder_nothing_is_loaded(scripted):
    service = scripted(short, store=Shelf())
    body = {"lora_name": "a", "lora_path": "/etc"}
    response = ask(
        service, Settings(admin_token="boss"), "POST", "/v1/load_lora_adapter", body=body, headers=bearer("boss")
    )  # fmt: skip
    assert response.status_code == 403 and "--adapter-folder" in response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.", "0"])
def test_on_loopback_a_request_addressed_to_another_name_is_refused(scripted, host):
    service = scripted(short)
    for method, path in ROUTES:
        assert ask(service, Settings(), method, path, headers={"Host": host}).status_code == 403
    assert not service.engine.asked


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"])
def test_loopback_names_are_answered(scripted, host):
    assert ask(scripted(short), Settings(), "GET", "/v1/models", headers={"Host": host}).status_code == 200


def test_which_names_are_answered_follows_from_the_address_listened_at():
    assert hosts_of("127.0.0.1") == LOOPBACK and "127.0.0.2" in hosts_of("127.0.0.2")
    assert hosts_of("0.0.0.0") is None and hosts_of("192.168.0.4") is None
    assert name_of("[::1]:8000") == "::1" and name_of("a.b:1") == "a.b"


def test_a_web_page_of_another_server_is_refused_and_our_own_is_not(scripted):
    service = scripted(short)
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:8000", 200)):
        response = ask(service, Settings(), "POST", "/v1/chat/completions", headers={"Origin": origin})
        assert response.status_code == status
        assert "access-control-allow-origin" not in response.headers


# -- how much may be sent ----------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_whether_its_length_is_stated_or_not(scripted, serving):
    service = scripted(short)
    url = serving(create_app(service, Settings(body_bytes=2000)))
    big = json.dumps(HELLO | {"user": "u" * 3000}).encode()
    kind = {"Content-Type": "application/json"}

    def parts():
        for start in range(0, len(big), 500):
            yield big[start : start + 500]

    for content in (big, parts()):
        response = httpx.post(url + "/v1/chat/completions", content=content, headers=kind)
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        assert response.headers["connection"] == "close"
    assert httpx.post(url + "/v1/chat/completions", json=HELLO).status_code == 200


def test_a_body_that_does_not_come_is_408(scripted, serving):
    url = serving(create_app(scripted(short), Settings(body_seconds=0.2)))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert raw(url, head + b"Content-Length: 90\r\n\r\n{").startswith(b"HTTP/1.1 408 ")


def raw(url, sent):
    """What comes back for these bytes, until the server closes or falls silent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=2) as line:
        line.sendall(sent)
        found = b""
        try:
            while part := line.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
    return found


SMUGGLED = [
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nContent-Length: 40\r\n\r\n{}{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost : localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
]


@pytest.fixture(scope="module")
def plain_url():
    """A server without an engine: what is tested is refused before one is asked."""
    from fastapi import FastAPI

    from lofi.serve.metrics import Meters
    from lofi.serve.security import Gate

    app = FastAPI()
    app.add_api_route("/v1/models", lambda: "open")
    app.add_middleware(Gate, settings=Settings(), meters=Meters(), paths=frozenset({"/v1/models"}))
    import contextlib
    import threading
    import time

    import uvicorn

    door = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    with contextlib.closing(door):
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("sent", SMUGGLED, ids=range(len(SMUGGLED)))
def test_headers_that_could_be_read_in_two_ways_get_one_refusal(plain_url, sent):
    found = raw(plain_url, sent + b"\r\n")
    assert found == b"" or found.split(b" ")[1] in (b"400", b"403", b"404", b"413", b"431"), found[:200]
    assert found.count(b"HTTP/1.1 ") <= 2 and b"open" not in found and b" 500 " not in found


def test_the_server_still_answers_after_them(plain_url):
    assert httpx.get(plain_url + "/v1/models").status_code == 200


# -- what may be opened ------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path):
    """An allowed folder with one adapter `good`, and a secret one outside."""
    for folder in (tmp_path / "allowed" / "good", tmp_path / "secret"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        header = json.dumps({"a": {}, "b": {}}).encode()
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return tmp_path / "allowed"


def status_of(path, settings):
    with pytest.raises(Refused) as told:
        allowed_folder(path, settings)
    assert "secret" not in told.value.message or path in told.value.message
    return told.value.status


def test_a_folder_inside_is_found_by_a_relative_and_an_absolute_path(shelf):
    settings = Settings(adapter_folder=shelf)
    assert allowed_folder("good", settings) == allowed_folder(str(shelf / "good"), settings) == shelf / "good"
    assert allowed_folder("./good/../good/", settings) == shelf / "good"
    (shelf / "run").mkdir()
    (shelf / "good").rename(shelf / "run" / "adapter")
    assert allowed_folder("run", settings) == shelf / "run" / "adapter"


@pytest.mark.parametrize(
    "path", ["../secret", "good/../../secret", "/etc", "/", "..", "~", "good/../../allowed/../secret", "//etc/passwd"]
)
def test_no_path_leads_outside(shelf, path):
    assert status_of(path, Settings(adapter_folder=shelf)) in (403, 404)
    assert status_of(str(shelf.parent / "secret"), Settings(adapter_folder=shelf)) == 403


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\ud800"])
def test_what_is_no_path_is_a_400(shelf, path):
    assert status_of(path, Settings(adapter_folder=shelf)) == 400


def test_no_link_leads_outside(shelf):
    settings = Settings(adapter_folder=shelf)
    (shelf / "link").symlink_to(shelf.parent / "secret")
    assert status_of("link", settings) == 403
    (shelf / "run").mkdir()
    (shelf / "run" / "adapter").symlink_to(shelf.parent / "secret")
    assert status_of("run", settings) == 404
    tensors = shelf / "good" / "adapter_model.safetensors"
    tensors.unlink()
    tensors.symlink_to(shelf.parent / "secret" / "adapter_model.safetensors")
    assert status_of("good", settings) == 403
    (shelf / "round").symlink_to(shelf / "round")
    assert status_of("round", settings) in (400, 404)


def test_a_folder_with_a_device_a_pipe_or_too_much_in_it_is_not_read(shelf):
    settings = Settings(adapter_folder=shelf, adapter_files=4, adapter_bytes=1000, adapter_tensors=2)
    good = shelf / "good"
    os.mkfifo(good / "pipe")
    assert status_of("good", settings) == 400
    (good / "pipe").unlink()
    (good / "more").write_bytes(bytes(1000))
    assert status_of("good", settings) == 413
    (good / "more").unlink()
    assert status_of("good", Settings(adapter_folder=shelf, adapter_tensors=1)) == 413
    for name in "abc":
        (good / name).write_text("")
    assert status_of("good", settings) == 413


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 5) + b"[1,2", struct.pack("<Q", 2) + b"5 "])
def test_a_tensor_file_that_is_none_is_said_to_be(tmp_path, content):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match="damaged"):
        tensor_count(path)


def test_a_tensor_file_with_an_endless_header_is_not_read(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(Refused, match="header"):
        tensor_count(path)


def test_a_path_outside_never_reaches_the_store(scripted, shelf):
    service = scripted(short, store=Shelf())
    settings = Settings(admin_token="boss", adapter_folder=shelf)
    for path, status in (("../secret", 403), ("good", 400), ("absent", 404)):
        body = {"lora_name": "a", "lora_path": path}
        response = ask(service, settings, "POST", "/v1/load_lora_adapter", body=body, headers=bearer("boss"))
        assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert service.store.opened == [shelf / "good"]


# -- fuzzing -----------------------------------------------------------------------------------------------------------


def test_no_request_that_the_openapi_document_suggests_fails_inside(scripted, shelf):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given
    from hypothesis import settings as bounds

    settings = Settings(admin_token="boss", adapter_folder=shelf, hosts=None)
    app = create_app(scripted(short, store=Shelf(), rows=8, queue=100), settings)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen: dict[int, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @bounds(
            max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def fuzz(case):
            response = case.call(headers=bearer("boss"))
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            assert response.status_code < 500, response.text

        fuzz()
    assert set(seen) <= {200, 400, 403, 404, 409, 413, 415, 429} and {200, 400, 404} <= set(seen), seen
