"""JSON to and from a server over HTTP, with every fault of the network as one sentence.

Knows nothing of what is asked. Uses the standard library: replaying a few prompts needs no client of its own.
Rejected: the openai package, which hides what a server of another kind answers and is not installed with lofi.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lofi.errors import LofiError, RequestError

_TRIES = 5
_LONGEST_WAIT = 20.0  # seconds; a server that asks for more is not waited for


class Refused(RequestError):
    """The server answered a request with a 4xx status: the request could not be answered as asked."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Connection:
    """A server by its address, such as http://127.0.0.1:8000, with or without /v1."""

    url: str
    api_key: str | None = None
    timeout: float = 120.0
    wait: Callable[[float], None] = time.sleep
    """How to let time pass before another try; tests put something shorter here."""

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RequestError(f"--endpoint is {self.url!r}, expected an address such as http://127.0.0.1:8000")

    @property
    def root(self) -> str:
        """The address without /v1 and the slash at its end."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    def get(self, path: str) -> Any:
        """What the server answers to GET, as JSON values. Raises as `post`."""
        return self._asked(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers to a JSON body, as JSON values; 429 and 503 are tried again a few times.

        Raises  Refused for another 4xx status; RequestError where nothing listens; LofiError where the server fails,
                is too slow, or does not answer in JSON
        """
        return self._asked(path, json.dumps(body).encode())

    def _asked(self, path: str, body: bytes | None) -> Any:
        for attempt in range(_TRIES):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    pause = _pause(error, attempt)
                    if pause is None or attempt == _TRIES - 1:
                        raise self._failure(path, error) from None
                self.wait(pause)
        raise AssertionError("unreachable")

    def _once(self, path: str, body: bytes | None) -> Any:
        where = self.root + path
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body is not None else {})
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            # the scheme was checked: no file or ftp address gets here
            with urllib.request.urlopen(urllib.request.Request(where, body, headers), timeout=self.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError:
            raise
        except TimeoutError:
            raise self._slow(where) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._slow(where) from None
            raise RequestError(
                f"nothing answers at {self.root} ({error.reason}); start the server, or correct --endpoint"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise LofiError(
                f"{where} broke off its answer ({type(error).__name__}); see the server's log and run it again"
            ) from None
        try:
            return json.loads(text)
        except ValueError:
            start = text[:60].decode("utf-8", "replace")
            raise LofiError(
                f"{where} does not answer in JSON but with {start!r}; give the address of an OpenAI-compatible server"
            ) from None

    def _slow(self, where: str) -> LofiError:
        return LofiError(f"{where} did not answer within {self.timeout:g} seconds; try again when the server is idle")

    def _failure(self, path: str, error: urllib.error.HTTPError) -> LofiError:
        where, status = self.root + path, f"(status {error.code}{_said(error.read())})"
        if error.code in (401, 403):
            key = "another" if self.api_key else "the server's"
            return Refused(f"{where} refuses access {status}; give {key} key with --api-key", error.code)
        if error.code in (429, 503):
            return LofiError(f"{where} is too busy {status}; try again later")
        if error.code < 500:
            return Refused(f"{where} refuses the request {status}; see what the server says there", error.code)
        return LofiError(f"{where} failed {status}; see the server's log")


def _pause(error: urllib.error.HTTPError, attempt: int) -> float | None:
    """Seconds until the next try; None where trying again is no use."""
    if error.code not in (429, 503):
        return None
    try:
        asked = float(error.headers.get("Retry-After", ""))
    except ValueError:
        asked = 0.5 * 2**attempt
    return max(asked, 0.0) if asked <= _LONGEST_WAIT else None


def _said(body: bytes) -> str:
    """What the server says is wrong, in OpenAI's shape or another, behind a colon; "" where it says nothing."""
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    fault = value.get("error", value.get("detail", value.get("message"))) if isinstance(value, dict) else value
    text = fault.get("message") if isinstance(fault, dict) else fault
    return f": {' '.join(str(text).split())[:300]}" if text else ""
