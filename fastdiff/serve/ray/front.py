"""In Ray's proxies: limits before a body travels, and words of ours where a replica was lost.

What reaches a replica is answered by its application, whatever happens there. Only the way to it can fail: then Ray's
proxy answers in plain text, or breaks a stream off. Here that becomes an answer as clients of the API know them.
"""

from __future__ import annotations

import re
import sys
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdiff.serve.asgi import ID, Guard, log
from fastdiff.serve.errors import GONE, Failure, failure
from fastdiff.serve.jobs import sent
from fastdiff.serve.logs import log_to
from fastdiff.serve.settings import Settings

IMPORT_PATH = f"{__name__}.middlewares"
LOST = Failure(503, "the replica that drew this was lost; ask again, the same seed gives the same image",
               "unavailable", retry_after=1.0)  # fmt: skip
AWAY = Failure(503, "no replica is ready", "unavailable", retry_after=5.0)
BUSY = Failure(503, "every replica is busy, and so is the queue", "busy", retry_after=1.0)
_OF_RAY = re.compile(r"/-/")  # health and routes of the proxy itself


def middlewares() -> list[Middleware]:
    """What Ray wraps around each proxy, the innermost first; settings come from its environment."""
    log_to(sys.__stderr__, "warning")  # Ray Serve puts another in its place, which leads to files
    return [Middleware(Whole), Middleware(Guard, settings=Settings()), Middleware(Answers)]


class Whole:
    """Read a body to its end before Ray's proxy, which would hold any amount of it, sees the request."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts, more = [], True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
        except HTTPException as error:
            await failure(error).response()(scope, receive, send)
            return
        told = False

        async def replayed() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}

        await self.app(scope, replayed, send)


class Answers:
    """Give each request an id and exactly one answer, in the API's words also where no application gave one."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _OF_RAY.match(scope["path"]):
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        if not ID.fullmatch(headers.get("x-request-id", "")):
            headers["x-request-id"] = uuid.uuid4().hex
        answer, gone = _Answer(send, headers["x-request-id"], scope), False

        async def watched() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        try:
            await self.app(scope, watched, answer.send)
        except Exception:
            log.exception("the proxy failed", extra={"facts": {"request_id": answer.name}})
        if not gone:
            await answer.close()


class _Answer:
    """One answer on its way."""

    def __init__(self, send: Send, name: str, scope: Scope):
        self._send, self.name, self._scope = send, name, scope
        self._instead: Failure | None = None
        self._started = self._stream = self._ended = False

    async def send(self, message: Message) -> None:
        """Pass a message on, or another one in its place."""
        if message["type"] == "http.response.start":
            self._instead = _instead(message)
            if self._instead is not None:
                await self._tell(self._instead)
                return
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._stream = kind.startswith("text/event-stream")
        elif self._instead is not None:
            return
        else:
            self._ended = not message.get("more_body", False)
        await self._named(message)

    async def close(self) -> None:
        """Answer where nobody did, and end a stream that broke off."""
        if not self._started:
            await self._tell(LOST)
        elif self._stream and not self._ended:
            self._note(LOST)
            await self._send({"type": "http.response.body", "body": sent("error", LOST.envelope()), "more_body": False})

    async def _tell(self, told: Failure) -> None:
        self._note(told)
        await told.response()(self._scope, _nothing, self._named)
        self._ended = True

    async def _named(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            MutableHeaders(scope=message)["x-request-id"] = self.name  # Ray adds one of its own
        await self._send(message)

    def _note(self, told: Failure) -> None:
        facts = {"request_id": self.name, "path": self._scope["path"][:200], "status": told.status}
        log.warning(told.message, extra={"facts": facts})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _instead(start: Message) -> Failure | None:
    """What to say in place of Ray's own answer; None: the answer is the application's, which never is plain text."""
    headers = Headers(raw=start["headers"])
    if start["status"] < 400 or start["status"] == GONE or not headers.get("content-type", "").startswith("text/plain"):
        return None
    if start["status"] == 503:
        return BUSY if "retry-after" in headers else AWAY
    return AWAY if start["status"] == 404 else LOST
