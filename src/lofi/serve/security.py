"""The gate in front of every route: who may come in, addressed how, with how large a body; and the log line after.

Addressed how: on loopback the Host header must be a loopback name (else any web page could reach the server under a
name of its own: DNS rebinding), and a browser's Origin must be the server itself, whatever the route. Who: every /v1
route asks for the API key where one is set; loading and unloading ask for the admin token and are off without one. Keys
are compared in constant time. Knows ASGI, no engine. Rejected: starlette's BaseHTTPMiddleware (a task and two queues a
request, and it hides a lost client), CORS (off: a page elsewhere has its own server to ask).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lofi.serve.faults import Refused, refused
from lofi.serve.limits import Settings
from lofi.serve.logs import log, place_of
from lofi.serve.metrics import Meters

ADMIN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
QUIET = frozenset({"/health", "/ready", "/metrics", "/v1/lofi/status"})  # asked every few seconds: debug lines
LEFT = 499  # what a log says where the client left before the answer


class Gate:
    """ASGI middleware: refuses, limits, counts, logs."""

    def __init__(self, app: ASGIApp, settings: Settings, meters: Meters, paths: frozenset[str]) -> None:
        self.app, self.settings, self.meters, self.paths = app, settings, meters, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(scope, receive, send, self.settings)
        try:
            admit(scope, self.settings)
            await self.app(scope, visit.receive, visit.send)
        except ClientDisconnect:
            pass  # nobody is there to be told; the log line says 499
        except Exception as error:
            await self._failed(visit, error)
        finally:
            self._told(visit)

    async def _failed(self, visit: Visit, error: Exception) -> None:
        answer = refused(error)
        if answer.status == 500:
            log(logging.ERROR, "failed", id=visit.id, route=self._route(visit), **place_of(error))
        if visit.status is None:
            await answer.response()(visit.scope, visit.receive, visit.send)

    def _told(self, visit: Visit) -> None:
        route, told = self._route(visit), visit.scope["lofi"]
        status = told.pop("status", None) or visit.status or LEFT
        self.meters.responded(route, status)
        level = logging.DEBUG if visit.path in QUIET and status < 500 else logging.INFO
        ms = round(1000 * (time.perf_counter() - visit.began), 2)
        log(level, "request", id=visit.id, route=route, status=status, ms=ms, **told)

    def _route(self, visit: Visit) -> str:
        """The route's own path; one word for whatever nobody serves, so that labels stay few."""
        if visit.path.startswith("/v1/models/"):
            return "/v1/models/{name}"
        return visit.path if visit.path in self.paths else "unknown"


class Visit:
    """One request on its way through: its id, the bytes it may still send, the status it got."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.path: str = scope["path"]
        self.id = secrets.token_hex(8)
        self.began = time.perf_counter()
        self.status: int | None = None
        self._room, self._seconds, self._read = settings.body_bytes, settings.body_seconds, False
        scope["lofi"] = {}  # what the routes add to the log line

    async def receive(self) -> Message:
        """The next part of the body, within the limits of size and time; after it, whether the client left."""
        if self._read:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self.began + self._seconds - time.perf_counter())):
                message = await self._receive()
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self._seconds:g} s: send it again") from None
        if message["type"] == "http.request":
            self._room -= len(message.get("body", b""))
            if self._room < 0:
                raise too_large()
            self._read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send on, with the request's id and, after a refused body, the connection closed."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            if self.status in (408, 413):
                message["headers"].append((b"connection", b"close"))
        await self._send(message)


def too_large() -> Refused:
    """413."""
    return Refused(413, "the body is larger than this server takes: send a shorter prompt", code="body_too_large")


def admit(scope: Scope, settings: Settings) -> None:
    """Refused where a request may not come in: by its Host, its Origin, its token, or its stated length."""
    headers = scope["headers"]
    hosts = _values(headers, b"host")
    if settings.hosts is not None:
        _addressed(hosts, _values(headers, b"origin"), settings.hosts)
    path = scope["path"]
    if path in ADMIN:
        _administrator(headers, settings)
    elif path.startswith("/v1/") and settings.api_key is not None:
        _known(headers, settings)
    for length in _values(headers, b"content-length"):
        if not length.isdigit() or len(length) > 18:
            raise Refused(400, "the content-length is no number: send the body's length")
        if int(length) > settings.body_bytes:
            raise too_large()


def _addressed(hosts: list[str], origins: list[str], allowed: frozenset[str]) -> None:
    if len(hosts) != 1 or name_of(hosts[0]) not in allowed:
        raise Refused(
            403, "the request is not addressed to this server by a name it has: use its URL, or start it with --host",
            code="unknown_host",
        )  # fmt: skip
    if any(origin.partition("://")[2].lower() != hosts[0].lower() for origin in origins):
        raise Refused(403, "the request comes from a web page of another server: use this server's own page at /")


def name_of(host: str) -> str:
    """A Host header without its port; brackets around IPv6 go too."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _administrator(headers: Any, settings: Settings) -> None:
    if settings.admin_token is None:
        raise Refused(403, "loading and unloading are off: start lofi serve with --admin-token", code="no_admin_token")
    token = _bearer(headers)
    if _same(token, settings.admin_token):
        return
    if settings.api_key is not None and _same(token, settings.api_key):
        raise Refused(403, "this route asks for the admin token, not the API key: send the admin token")
    raise Refused(401, "the admin token is missing or wrong: send it as `Authorization: Bearer TOKEN`")


def _known(headers: Any, settings: Settings) -> None:
    token = _bearer(headers)
    by_key = _same(token, settings.api_key or "")
    if not by_key and not (settings.admin_token is not None and _same(token, settings.admin_token)):
        raise Refused(
            401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`", code="invalid_api_key"
        )


def _bearer(headers: Any) -> bytes:
    found = [value for key, value in headers if key == b"authorization"]
    kind, _, token = found[0].partition(b" ") if len(found) == 1 else (b"", b"", b"")
    return bytes(token.strip()) if kind.lower() == b"bearer" else b""


def _same(given: bytes, wanted: str) -> bool:
    return bool(given) and hmac.compare_digest(given, wanted.encode("utf-8"))


def _values(headers: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]
