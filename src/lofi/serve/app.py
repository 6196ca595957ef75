"""The HTTP routes: OpenAI's chat and completions, models, adapters in and out, health, metrics, the page.

Knows routes and status codes; what an answer says is the engine's, how it is written is for answers.py and
streaming.py. No interactive API pages (they load scripts from elsewhere); the OpenAPI document is at /openapi.json.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from lofi.serve.allowed import allowed_folder, checked_name
from lofi.serve.answers import body_of_answers
from lofi.serve.asking import Batch, asked_chat, asked_text
from lofi.serve.bodies import body_of, documented, schemas
from lofi.serve.delivery import Answers
from lofi.serve.faults import Refused
from lofi.serve.limits import Settings
from lofi.serve.logs import log
from lofi.serve.metrics import CONTENT_TYPE
from lofi.serve.openai_types import ChatBody, CompletionBody, LoadBody, UnloadBody
from lofi.serve.page import ADDRESSES, page_router
from lofi.serve.request import Draining, UnknownAdapter
from lofi.serve.security import LEFT, Gate
from lofi.serve.service import Service
from lofi.serve.streaming import Chunks, EventStream, gone

STOPPING = "the server is stopping and takes no new request: ask another one, or this one again in a moment"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": told}
    for status, told in {
        400: "The request cannot be answered as asked", 401: "API key missing or wrong", 403: "Not allowed",
        404: "No such model or folder", 408: "The body came too slowly", 409: "Refused by a proof, or a name is taken",
        413: "Too large", 415: "Not JSON", 429: "The queue is full: see Retry-After", 500: "The engine failed",
        503: "Stopping, or not running", 504: "Not finished in time",
    }.items()
}  # fmt: skip


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The server's routes over one service; no global state, so a process may have several."""
    from lofi import __version__

    app = FastAPI(title="lofi", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes = Routes(service, settings)
    for method, path, endpoint, body in routes.table():
        app.add_api_route(
            path, endpoint, methods=[method], responses=ERRORS, response_model=None,
            openapi_extra=None if body is None else documented(body),
        )  # fmt: skip
    app.include_router(page_router())
    app.add_exception_handler(HTTPException, _plain_fault)
    paths = frozenset(path for _, path, _, _ in routes.table()) | ADDRESSES | {"/openapi.json"}
    app.add_middleware(Gate, settings=settings, meters=service.meters, paths=paths)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that the routes read by themselves."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = found.setdefault("components", {}).setdefault("schemas", {})
        components |= schemas(ChatBody, CompletionBody, LoadBody, UnloadBody)
        app.openapi_schema = found
    return app.openapi_schema


async def _plain_fault(request: Request, error: Any) -> Response:
    """404 and 405 of the router, in OpenAI's shape."""
    told = {404: "there is no such route: GET /openapi.json lists them", 405: "this route takes another method"}
    answer = Refused(error.status_code, told.get(error.status_code, str(error.detail)))
    found = answer.response()
    for name, value in (error.headers or {}).items():
        found.headers[name] = value
    return found


class Routes:
    """The endpoints, bound to one service."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self.settings = service, settings
        self._loading = asyncio.Lock()

    def table(self) -> list[tuple[str, str, Any, Any]]:
        """(method, path, endpoint, body)."""
        return [
            ("POST", "/v1/chat/completions", self.chat, ChatBody),
            ("POST", "/v1/completions", self.text, CompletionBody),
            ("GET", "/v1/models", self.models, None),
            ("GET", "/v1/models/{name:path}", self.model, None),
            ("POST", "/v1/load_lora_adapter", self.load, LoadBody),
            ("POST", "/v1/unload_lora_adapter", self.unload, UnloadBody),
            ("GET", "/v1/lofi/status", self.status, None),
            ("GET", "/health", self.health, None),
            ("GET", "/ready", self.ready, None),
            ("GET", "/metrics", self.metrics, None),
        ]

    # -- answers ------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        self._open()
        body = await body_of(request, ChatBody)
        return await self._answer(request, await asked_chat(self.service, self.settings, body))

    async def text(self, request: Request) -> Response:
        """Continue a text."""
        self._open()
        body = await body_of(request, CompletionBody)
        return await self._answer(request, await asked_text(self.service, self.settings, body))

    def _open(self) -> None:
        if self.service.stopping:
            raise Draining(STOPPING)
        if not self.service.alive:
            raise Refused(503, "the engine is not running: restart the server", code="engine_down")

    async def _answer(self, request: Request, batch: Batch) -> Response:
        self._open()  # the encoding may have taken a while
        service, told = self.service, request.scope["lofi"]
        told |= {"adapter": batch.speaker.adapter, "stream": batch.stream}
        answers = Answers(batch.asked, Tally(service.meters, told), streamed=batch.stream)
        service.active.add(answers)
        answers.submit(service.engine, service.bridge())
        if batch.stream:
            return EventStream(Chunks(batch, answers, service.spelling))
        if not await _settled(request, answers):
            told["status"] = LEFT
            return Response(status_code=204)  # nobody reads it
        return JSONResponse(body_of_answers(batch, answers, service.spelling))

    # -- adapters -----------------------------------------------------------------------------------------------------

    async def models(self) -> Response:
        """The base first, then the adapters, as vLLM lists them."""
        return JSONResponse({"object": "list", "data": self._models()})

    async def model(self, name: str) -> Response:
        """One of them."""
        self.service.speaker(name)
        return JSONResponse(next(row for row in self._models() if row["id"] == name))

    def _models(self) -> list[dict[str, Any]]:
        service = self.service
        common = {"object": "model", "created": int(service.started), "owned_by": "lofi"}
        base = {"id": service.model_name, **common, "root": service.model_name, "parent": None}
        rows = [base | {"max_model_len": service.context}]
        for held in service.adapters():
            rows.append({"id": held.name, **common, "root": held.folder.name, "parent": service.model_name})
        return rows

    async def load(self, request: Request) -> Response:
        """Load an adapter from the allowed folder; it is proved before it is admitted."""
        body = await body_of(request, LoadBody)
        store = self._store()
        name = checked_name(body.lora_name, frozenset({"base", self.service.model_name}))
        replace = bool(body.load_inplace)
        async with self._loading:  # one at a time: a proof takes a forward's memory
            if name in self.service.states() and not replace:
                told = f"there is an adapter {name!r} already: unload it first, or send load_inplace: true"
                raise Refused(409, told, code="name_taken", param="lora_name")
            folder = await asyncio.to_thread(allowed_folder, body.lora_path, self.settings)
            held = await asyncio.to_thread(store.load, name, folder, replace=replace)
        log(logging.INFO, "loaded", adapter=name, rank=held.rank, bytes=held.bytes, key=held.key[:16])
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Take an adapter out; requests that use it finish with it."""
        body = await body_of(request, UnloadBody)
        store = self._store()
        if body.lora_name not in self.service.states():
            raise UnknownAdapter(f"there is no adapter {body.lora_name[:100]!r}: GET /v1/models lists those here")
        await asyncio.to_thread(store.unload, body.lora_name)
        log(logging.INFO, "unloaded", adapter=body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _store(self) -> Any:
        if self.service.stopping:
            raise Draining(STOPPING)
        if self.service.store is None:
            raise Refused(403, "this server holds no adapters: start it with --adapter-folder", code="no_folder")
        return self.service.store

    # -- state --------------------------------------------------------------------------------------------------------

    async def status(self, request: Request) -> Response:
        """What the page shows; `admin` says whether adapters can be loaded here at all."""
        return JSONResponse(self.service.status(admin=self.settings.can_load))

    async def health(self) -> Response:
        """200 while the process and its engine live."""
        alive = self.service.alive
        return JSONResponse({"status": "ok" if alive else "engine down"}, status_code=200 if alive else 503)

    async def ready(self) -> Response:
        """200 while new requests are taken."""
        ready = self.service.ready
        told = "ready" if ready else "draining" if self.service.alive else "engine down"
        return JSONResponse({"status": told}, status_code=200 if ready else 503)

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(self.service.exposition.text(), headers={"Content-Type": CONTENT_TYPE})


class Tally:
    """Counts tokens and ends for the meters, and for the request's own log line."""

    def __init__(self, meters: Any, told: dict[str, Any]) -> None:
        self.meters, self.told = meters, told

    def tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """Some tokens came."""
        self.meters.tokens(count, seconds, first=first)

    def ended(self, choice: Any) -> None:
        """One answer ended; a request with several says the last end."""
        self.meters.ended(choice)
        told, prompt = self.told, len(choice.asked.prompt)
        told["prompt_tokens"] = told.get("prompt_tokens", 0) + prompt
        told["tokens"] = told.get("tokens", 0) + len(choice.tokens)
        told["finish"] = choice.finish
        if choice.first:
            told["first_token_ms"] = round(1000 * (choice.first - choice.started), 2)


async def _settled(request: Request, answers: Answers) -> bool:
    """Wait for every answer; False, with all of them taken back, where the client leaves before."""
    whole = asyncio.ensure_future(answers.whole())
    left = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
        return answers.done
    finally:
        whole.cancel()
        left.cancel()
        if not answers.done:
            answers.end("cancelled", "the client left")
