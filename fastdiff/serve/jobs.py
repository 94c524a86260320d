"""One request's images: asked for together, answered together or as they come, given up when nobody listens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from fastdiff.engine import AsyncEngine, Preview, Ticket
from fastdiff.engine.bucket import short_of_memory
from fastdiff.errors import Cancelled, OutOfMemory
from fastdiff.serve.asgi import log, note
from fastdiff.serve.encode import encode
from fastdiff.serve.errors import GONE, failure
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.models import Served
from fastdiff.serve.schema import NO_TOKENS, Encoding, ImageRequest, Order

Result = TypeVar("Result")
HEARTBEAT = 15.0  # seconds without an event after which proxies are told that the stream lives


class Job(NamedTuple):
    """Images of one request."""

    tickets: list[Ticket]
    seeds: list[int]
    size: str
    encoding: Encoding
    quality: int | None

    def give_up(self) -> None:
        """Cancel what is not finished."""
        for ticket in self.tickets:
            if not ticket.done():
                ticket.cancel()


async def submit(engine: AsyncEngine, seeds: Sequence[int], **options: Any) -> list[Ticket]:
    """Ask for an image for each seed: all of them, or none.

    Raises:
        FastdiffError: what ``Engine.submit`` raises for the first that is not taken.
    """
    tickets: list[Ticket] = []
    try:
        for seed in seeds:
            tickets.append(await engine.submit(seed=seed, **options))
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do something for a client as long as there is one. Its body has been read before.

    Raises:
        Cancelled: if the client went away.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Studio:
    """Turns what an engine makes into what clients read."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, served: Served):
        self.engine, self.metrics, self.served = engine, metrics, served
        # encoders and decoders use all cores by themselves, and the memory of several decoders nobody has planned for
        self._encoder, self._decoder = asyncio.Semaphore(1), asyncio.Semaphore(1)

    async def order(self, asked: ImageRequest) -> Order:
        """What to ask the engine for, see ``Served.order``.

        Raises:
            EngineBusy: before anything is done, if the queue is full.
        """
        self.engine.engine.admissible()
        async with self._encoder:
            with self.metrics.encode.time():
                return await asyncio.to_thread(self.served.order, asked)

    async def picture(self, x: Tensor, job: Job, preview: bool = False) -> str:
        """An image in base64; made in threads, since decoding and compressing take a while."""
        begin = time.perf_counter()
        async with self._decoder:
            image = await asyncio.to_thread(self._decoded, x, preview)
        text = await asyncio.to_thread(encode, image, job.encoding, job.quality)
        self.metrics.decode.observe(time.perf_counter() - begin)
        return text

    def _decoded(self, x: Tensor, preview: bool) -> Image.Image:
        try:
            return self.served.picture(x, preview)
        except Exception as error:
            if short_of_memory(error):
                raise OutOfMemory("not enough memory to decode the image") from error
            raise

    async def pictures(self, job: Job) -> list[str]:
        """All images of a job.

        Raises:
            EngineError: why there are none.
        """
        return [await self.picture(x, job) for x in await self.engine.results(job.tickets)]

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """Previews and images of a job as they come, as server-sent events; a failure is the last of them."""
        shown = [0] * len(job.tickets)
        try:
            async with aclosing(self.engine.follow(job.tickets)) as going:
                async for i, preview in going:
                    yield await self._event(job, i, preview, shown)
        except Exception as error:
            told = failure(error)
            if told.status == 500:
                log.exception("stream failed")
            yield sent("error", told.envelope())

    async def _event(self, job: Job, i: int, preview: Preview | None, shown: list[int]) -> bytes:
        kind = "completed" if preview is None else "partial_image"
        x = job.tickets[i].result(0) if preview is None else preview.x
        event: dict[str, Any] = {
            "type": f"image_generation.{kind}",
            "b64_json": await self.picture(x, job, preview is not None),
            "created_at": int(time.time()),
            "background": "opaque",
            "output_format": job.encoding,
            "quality": "auto",
            "size": job.size,
            "image_index": i,
            "seed": job.seeds[i],
        }
        if preview is None:
            event["usage"] = NO_TOKENS
        else:
            event |= {"partial_image_index": shown[i], "step": preview.step, "steps": preview.steps}
            shown[i] += 1
        return sent(event["type"], event)


def sent(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def beating(events: AsyncIterator[bytes], every: float = HEARTBEAT) -> AsyncIterator[bytes]:
    """The same events, with a comment between them wherever there is none for a while."""
    waiting: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait((waiting,), timeout=every)
            if not done:
                yield b": still here\n\n"
                continue
            event, waiting = waiting.result(), None
            if event is None:
                return
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)


class EventStream(StreamingResponse):
    """Server-sent events of a job. Whoever stops listening gives the job up."""

    def __init__(self, studio: Studio, job: Job):
        super().__init__(
            beating(studio.events(job)), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
        self.studio, self.job = studio, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.give_up()
            if any(ticket.cancelled for ticket in self.job.tickets):
                note(scope, status=GONE)
            self.studio.metrics.waited(self.job.tickets)
