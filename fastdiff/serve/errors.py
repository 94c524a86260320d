"""Every failure as the JSON that clients of such APIs expect, and as a status that says whether to try again."""

from __future__ import annotations

import math
import reprlib
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fastdiff.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
    FastdiffError,
    NotFinite,
    OutOfMemory,
    PlanError,
    ShapeError,
)

GONE = 499  # the client went away: for the log, since nobody reads the answer
_RETRY_SECONDS = 5.0  # where nothing better is known
_CODES = {
    400: "invalid_json",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "body_too_large",
}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 2


class Refused(FastdiffError, ValueError):
    """A request that this server does not serve.

    Args:
        message: the value received, and those allowed.
        param: which field of the request it is about.
        status: of HTTP.
        code: a word for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_value"):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Failure(NamedTuple):
    """What a client is told."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: float | None = None

    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 408:
            headers["connection"] = "close"  # the rest of the body may still come
        return JSONResponse(self.envelope(), self.status, headers)


def failure(error: BaseException) -> Failure:
    """What to tell a client about an exception. Only messages of our own are passed on."""
    text = str(error)
    match error:
        case Refused():
            return Failure(error.status, text, error.code, error.param)
        case PlanError() | ShapeError():
            return Failure(400, text, "invalid_value")
        case NotFinite():  # the same options give the same bits, so nobody should try again
            return Failure(422, text, "not_finite")
        case EngineBusy():
            return Failure(503, text, "busy", retry_after=error.retry_after)
        case EngineClosed():
            return Failure(503, "the server takes no requests now", "unavailable", retry_after=_RETRY_SECONDS)
        case DeadlineExceeded():
            return Failure(503, text, "timeout", retry_after=_RETRY_SECONDS)
        case OutOfMemory():
            return Failure(503, text, "out_of_memory", retry_after=_RETRY_SECONDS)
        case Cancelled():
            return Failure(GONE, text, "cancelled")
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return Failure(error.status_code, str(error.detail), _CODES.get(error.status_code, "http_error"))
    return Failure(500, "an error inside the server; its log says more under this request's id", "internal_error")


def _invalid(error: RequestValidationError) -> Failure:
    """The first thing wrong with a body, in one line. The value is shortened: it may be large, or no text."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    param = ascii(".".join(place))[1:-1][:100] or None
    if first["type"] == "json_invalid":
        return Failure(400, f"the body is not JSON: {first['ctx']['error']}", "invalid_json")
    if first["type"] == "missing" or not place:
        return Failure(400, "the body has to be a JSON object, with Content-Type: application/json", "invalid_json")
    if first["type"] == "extra_forbidden":
        return Failure(400, f"unknown parameter {param}", "unknown_parameter", param)
    got = ascii(_short.repr(first["input"]))[1:-1]
    return Failure(400, f"{param} is {got}; {first['msg'][:1].lower()}{first['msg'][1:]}", "invalid_value", param)
