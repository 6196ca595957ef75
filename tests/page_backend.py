"""A server for the page's tests: the endpoints that the page asks, with canned answers, and what was asked of it.

Its answers have the shapes that the real one gives; tests/serve/test_browser.py runs the page against that one too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from lofi.serve.page import page_router

MODEL = "lofi-tiny"
TOKEN = "the-admin-token"
CODE = "Here it is:\n\n```sql\nSELECT name\nFROM singer;\n```\nThat is `all`."
ATTACK = '<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> [a](javascript:1)'
ANSWERS = {  # by prompt, for anyone; else by model
    "attack": ATTACK,
    "code": CODE,
    "slow": "word " * 400,
}
BY_MODEL = {
    MODEL: "The singer table has three rows in all.",
    "sql-en": "The singer table has two rows in all.",
    "sql-vi": "Bảng ca sĩ có ba dòng.",
    "chatty": "The singer table has three rows in all.",
}


def adapter(name: str, **changes: Any) -> dict[str, Any]:
    """One adapter as the status tells it."""
    plain = {
        "name": name,
        "rank": 8,
        "bytes": 1_320_000,
        "state": "device",
        "modules": ("down_proj", "lm_head", "q_proj"),
        "requests": 12,
        "tokens": 480,
    }
    return {**plain, "share": 0.25, "loaded_at": time.time() - 95, **changes}


class Backend:
    """What the server says, and what it was asked."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.draining = False
        self.admin = True
        self.pace = 0.004
        self.asked: list[dict[str, Any]] = []
        self.statuses = 0
        self.ends: list[str] = []  # of answers: "whole", or "left" where the reader went away before
        self.adapters = [
            adapter("sql-en", share=0.5, requests=24, tokens=960),
            adapter("sql-vi", rank=16, bytes=2_640_000, state="host", share=0.125, requests=6),
            adapter("chatty", rank=4, bytes=660_000, state="disk", share=0, requests=0, tokens=0),
        ]

    def status(self) -> dict[str, Any]:
        self.statuses += 1
        wave = 40 + 12 * (self.statuses % 5)
        engine = {
            "running": 3,
            "waiting": self.statuses % 3,
            "rows": 16,
            "queue": 256,
            "cache_tokens": 1234,
            "cache_capacity": 16384,
            "steps": 5321,
            "prompt_tokens": 8123,
            "generated_tokens": 20456,
            "finished": {"stop": 31, "length": 4, "cancelled": 0},
            "tokens_per_second": wave,
            "draining": self.draining,
        }
        last = {
            "adapter": "sql-en",
            "prompt_tokens": 31,
            "tokens": 24,
            "seconds": 0.52,
            "first_token_ms": 41.0,
            "finish": "stop",
        }
        return {
            "model": MODEL,
            "uptime": 4211.0,
            "draining": self.draining,
            "engine": engine,
            "adapters": self.adapters,
            "base": {"requests": 9, "tokens": 331},
            "requests": [last, {**last, "adapter": None, "finish": "length"}, {**last, "seconds": 0.91}],
            "latency": {
                "first_token_ms": {"p50": 38.0 + self.statuses % 4, "p95": 71.0, "p99": 90.0},
                "token_ms": {"p50": 9.4, "p95": 14.0, "p99": 20.0},
            },
            "admin": self.admin,
            "context": 1024,
        }


def error(status: int, message: str, **headers: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def backend_app(backend: Backend) -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())

    def locked(request: Request) -> JSONResponse | None:
        if backend.key is None or request.headers.get("authorization") == f"Bearer {backend.key}":
            return None
        return error(401, "this server needs its key: send Authorization: Bearer KEY")

    @app.get("/v1/lofi/status")
    def status(request: Request) -> Any:
        return locked(request) or backend.status()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        body = await request.json()
        backend.asked.append(body)
        names = [MODEL, *(item["name"] for item in backend.adapters)]
        prompt = body["messages"][-1]["content"]
        if refusal := locked(request):
            return refusal
        if body["model"] not in names:
            return error(404, f"no model or adapter is named {body['model']!r}; the nearest is 'sql-en'")
        if prompt == "busy":
            return error(429, "the queue is full", Retry_After="7")
        return StreamingResponse(_stream(backend, body["model"], prompt), media_type="text/event-stream")

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Any:
        body = await request.json()
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return error(401, "the admin token is wrong")
        if body["lora_path"] == "dead":
            return error(400, "the adapter in dead changes nothing: its B is zero everywhere, train it first")
        backend.adapters.append(adapter(body["lora_name"], rank=2, requests=0, tokens=0, share=0))
        return {"status": "ok"}

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Any:
        body = await request.json()
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return error(401, "the admin token is wrong")
        backend.adapters = [item for item in backend.adapters if item["name"] != body["lora_name"]]
        return {"status": "ok"}

    return app


async def _stream(backend: Backend, model: str, prompt: str) -> AsyncIterator[str]:
    ends, end = backend.ends, "left"  # this test's, though it may be over when the stream ends
    try:
        async for event in _events(backend, model, prompt):
            yield event
        end = "whole"
    finally:
        ends.append(end)


async def _events(backend: Backend, model: str, prompt: str) -> AsyncIterator[str]:
    def event(**fields: Any) -> str:
        told = {"object": "chat.completion.chunk", "model": model, **fields}
        return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"

    pieces = ANSWERS.get(prompt, BY_MODEL.get(model, "Hello.")).split(" ")
    yield ": a comment\n\n"
    yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for i, piece in enumerate(pieces):
        if prompt == "broken" and i == 2:
            return
        if prompt == "failing" and i == 2:
            yield event(error={"message": "the worker failed: ask again", "type": "server_error"})
            return
        yield event(choices=[{"index": 0, "delta": {"content": (" " if i else "") + piece}, "finish_reason": None}])
        await asyncio.sleep(backend.pace)
    yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield event(
        choices=[], usage={"prompt_tokens": 17, "completion_tokens": len(pieces), "total_tokens": 17 + len(pieces)}
    )
    yield "data: [DONE]\n\n"


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address at which a thread of this process serves an app."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=5)
