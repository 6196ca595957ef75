"""Every failure as an HTTP answer in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}.

Knows which exception means which status; the sentence is the exception's own. What nobody foresaw is a 500 that says
nothing of its cause to the client (the log has the place). Rejected: FastAPI's 422 with a list of pydantic's findings,
which no OpenAI client reads.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from lofi.errors import AdapterFileError, LofiError, ProofError, RequestError
from lofi.serve.request import Draining, Overloaded, UnknownAdapter

UNFORESEEN = "the server failed while it answered; its log says where, under this request's x-request-id"
DRAIN_RETRY = 5.0  # seconds: by then another server, or this one again, may answer
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
    409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
    503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


class Refused(Exception):
    """An answer that is an error: its status, sentence, and what OpenAI's clients read beside it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.after = status, message, code, param, after

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, WWW-Authenticate; {} for most."""
        found = {} if self.after is None else {"Retry-After": str(max(1, math.ceil(self.after)))}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers())


def refused(error: BaseException) -> Refused:
    """The HTTP answer that an exception stands for."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UnknownAdapter):
        return Refused(404, str(error), code="model_not_found", param="model")
    if isinstance(error, Overloaded):
        return Refused(429, str(error), code="queue_full", after=error.retry_after)
    if isinstance(error, Draining):
        return Refused(503, str(error), code="draining", after=DRAIN_RETRY)
    if isinstance(error, ProofError):
        return Refused(409, str(error), code="proof_failed")
    if isinstance(error, AdapterFileError):
        return Refused(400, str(error), code="adapter_unreadable")
    if isinstance(error, RequestError):
        return Refused(400, str(error))
    if isinstance(error, LofiError):
        return Refused(500, str(error))
    return Refused(500, UNFORESEEN, code="internal_error")


def ended(finish: str | None, sentence: str | None) -> Refused:
    """The error that an answer ended with instead of "stop" or "length"."""
    if finish == "deadline":
        return Refused(504, sentence or "the answer was not finished in time: ask for fewer tokens", code="deadline")
    if finish == "gone":
        return Refused(404, sentence or "the adapter was unloaded", code="model_not_found", param="model")
    if finish == "cancelled":
        return Refused(503, sentence or "the answer was cancelled", code="cancelled", after=DRAIN_RETRY)
    return Refused(500, sentence or UNFORESEEN, code="engine_error")
