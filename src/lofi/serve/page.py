"""The page served at `/`: a fixed list of files from the package, each with its own route and strict headers.

Knows file names, media types and headers; knows no engine, no adapter and no token (the page asks the API as any other
client does). Every address is written out here, so no part of a request ever becomes a path. The files are read once,
when the routes are made; browsers keep them and ask with If-None-Match, which answers 304 after an upgrade has not
changed them.

Rejected: starlette's StaticFiles (opens what the address says), a build step and a framework (nothing to install, and
what is served is what is read), year-long caching under hashed names (addresses would change with every edit).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).with_name("static")
INDEX = "index.html"
FILES = (  # every file of the folder; what is not named here is not served
    *(INDEX, "style.css", "views.css", "icon.svg", "en.json", "vi.json", "early.js", "app.js", "words.js", "dom.js"),
    *("api.js", "answer.js", "watch.js", "dialog.js", "text.js", "picker.js", "settings.js", "chat.js", "compare.js"),
    *("composer.js", "outcome.js", "difference.js", "adapters.js", "loading.js", "table.js", "live.js", "spark.js"),
)
MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # with none allowed: no string ever becomes markup or code
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked about before every use
}


@dataclass(frozen=True)
class PageFile:
    """One file as it goes out."""

    body: bytes
    media: str
    etag: str


def address(name: str) -> str:
    """Where a file of the page is served: the index at `/`, the others under `/static/`."""
    return "/" if name == INDEX else f"/static/{name}"


ADDRESSES = frozenset(address(name) for name in FILES)
"""What anyone may fetch without a key: the page holds no secret, and asks for the key itself."""


def page_router() -> APIRouter:
    """The page's routes, GET and HEAD, outside the API's schema; raises FileNotFoundError where a file is missing."""
    router = APIRouter()
    for name in FILES:
        router.add_api_route(
            address(name), _sender(_read(name)), methods=["GET", "HEAD"], include_in_schema=False, name=f"page {name}"
        )
    return router


def _read(name: str) -> PageFile:
    body = (FOLDER / name).read_bytes()
    return PageFile(body, MEDIA[Path(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _sender(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    headers = {**HEADERS, "ETag": file.etag}

    async def send(request: Request) -> Response:
        if _has(request.headers.get("if-none-match", ""), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media, headers=headers)

    return send


def _has(asked: str, etag: str) -> bool:
    """Whether If-None-Match names this version (RFC 9110, 13.1.2: the weak comparison, `*` is any)."""
    return any(item.strip().removeprefix("W/") in (etag, "*") for item in asked.split(","))
