"""Around every request: its id, its line in the log, its count; who may ask, and how much may be sent."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdiff.serve.errors import Failure, failure
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.settings import Settings

log = logging.getLogger("fastdiff.serve")
ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OTHER = "other"  # label for paths that are no route of ours: anybody may invent them
_PROTECTED = "/v1/"
_RETRY_SECONDS = 1.0


def note(scope: Scope, **facts: Any) -> None:
    """Add facts to the line that the log will have about a request."""
    scope["fastdiff.facts"].update(facts)


class Watch:
    """Give each request an id, log it, count it, and answer where the server itself failed."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if ID.fullmatch(given) else uuid.uuid4().hex
        scope["fastdiff.facts"] = facts = {"request_id": name, "method": scope["method"], "path": scope["path"][:200]}

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self.app(scope, receive, told)
        except Exception as error:
            log.exception("request failed", extra={"facts": facts})
            if status:
                raise  # half an answer is out: the server breaks the connection off
            await failure(error).response()(scope, receive, told)
        finally:
            status = facts.pop("status", status)
            seconds = time.monotonic() - begin
            route = getattr(scope.get("route"), "path", _OTHER)
            self.metrics.request.labels(route, str(status)).observe(seconds)
            facts |= {"status": status, "seconds": round(seconds, 6)}
            log.info("request", extra={"facts": facts})


class Guard:
    """Turn away who has no key, who sends too much or too slowly, and more requests than the server can hold."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings, self.active = app, settings, 0
        key = settings.api_key
        self._key = None if key is None else key.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        self.active += 1
        try:
            await self.app(scope, self._measured(receive), send)
        finally:
            self.active -= 1

    def _refused(self, scope: Scope) -> Failure | None:
        headers, limit = Headers(scope=scope), self.settings.max_body
        if scope["path"].startswith(_PROTECTED):
            if self._key is not None and not self._known(headers.get("authorization", "")):
                return Failure(401, "give the server's key: Authorization: Bearer KEY", "invalid_api_key")
            if self.active >= self.settings.max_requests:
                message = f"{self.active} requests are being served already"
                return Failure(503, message, "busy", retry_after=_RETRY_SECONDS)
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            return _too_large(limit)
        return None

    def _known(self, header: str) -> bool:
        assert self._key is not None
        kind, _, key = header.partition(" ")
        same = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        return kind.lower() == "bearer" and same

    def _measured(self, receive: Receive) -> Receive:
        """``receive`` with a limit on the bytes of a body, and on the time it may take."""
        read, whole = 0, False
        deadline = time.monotonic() + self.settings.body_timeout

        async def measured() -> Message:
            nonlocal read, whole
            if whole:  # what comes now says that the client went away
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive in {self.settings.body_timeout:g} s") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self.settings.max_body:
                raise HTTPException(413, _too_large(self.settings.max_body).message)
            return message

        return measured


def _too_large(limit: int) -> Failure:
    return Failure(413, f"the body is too large; allowed: {limit} bytes", "body_too_large")
