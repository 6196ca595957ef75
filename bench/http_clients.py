"""Clients over HTTP: connections that stay open, requests and answers as bytes, on asyncio's streams.

A client library would take longer over a short answer than the server does, and both share the machine. Speaks as much
of HTTP/1.1 as uvicorn does: a length or chunks. Knows nothing of lofi but the paths it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self


@dataclass
class Reply:
    """A whole answer: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Refusal(RuntimeError):
    """An answer that is not 200."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"status {reply.status}: {reply.body[:300]!r}")
        self.reply = reply


class Connection:
    """One connection that is used again and again, opened anew where the server closed it."""

    def __init__(self, port: int, *, token: str | None = None) -> None:
        self.port, self.token = port, token
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()
        self.reader = self.writer = None

    async def ask(self, path: str, body: Any = None, *, timeout: float = 120.0) -> Reply:
        """POST a JSON body, or GET where there is none, and the whole answer."""
        async with asyncio.timeout(timeout):
            status, headers = await self._send(path, body)
            return Reply(status, headers, b"".join([part async for part in self._body(headers)]))

    async def events(self, path: str, body: Any) -> AsyncIterator[tuple[float, dict[str, Any]]]:
        """Each event of a streamed answer as (when it came, its object), [DONE] left out.

        Raises  Refusal where the server answers anything but 200
        """
        status, headers = await self._send(path, body)
        if status != 200:
            raise Refusal(Reply(status, headers, b"".join([part async for part in self._body(headers)])))
        left = b""
        async for part in self._body(headers):
            now = time.perf_counter()
            *whole, left = (left + part).split(b"\n\n")
            for event in whole:
                data = b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
                if data and data != b"[DONE]":
                    yield now, json.loads(data)

    async def _send(self, path: str, body: Any) -> tuple[int, dict[str, str]]:
        raw = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n"
        head += f"authorization: Bearer {self.token}\r\n" if self.token else ""
        head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        reader, writer = await self._open()
        writer.write(head.encode() + raw)
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
        return int(first.split(" ", 2)[1]), headers

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.reader is None or self.writer is None or self.reader.at_eof():
            await self.close()
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self.reader, self.writer

    async def _body(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        assert self.reader is not None
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        elif length := int(headers.get("content-length", 0)):
            yield await self.reader.readexactly(length)
        if headers.get("connection", "").lower() == "close":
            await self.close()
