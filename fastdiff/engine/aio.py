"""The engine for asyncio: waiting for an image, or for its previews, blocks nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from torch import Tensor

from fastdiff.engine.engine import Engine
from fastdiff.engine.ticket import Preview, Ticket

News = tuple[int, Preview | None]


def _tell(loop: asyncio.AbstractEventLoop, waiting: asyncio.Queue[News], i: int, preview: Preview | None) -> None:
    with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
        loop.call_soon_threadsafe(waiting.put_nowait, (i, preview))


def _give_up(made: asyncio.Future[Ticket]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().cancel()


class AsyncEngine:
    """An ``Engine`` whose requests are awaited. A task that is cancelled cancels its request.

    Args:
        engine: what runs them; it may serve others beside.
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    async def submit(self, class_label: int | None = None, **options: Any) -> Ticket:
        """See ``Engine.submit``; its host work is done in a thread."""
        made = asyncio.ensure_future(asyncio.to_thread(self.engine.submit, class_label, **options))
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(_give_up)  # the thread goes on, and nobody would hold its ticket
            raise

    async def result(self, ticket: Ticket) -> Tensor:
        """Wait for an image ``[1, C, H, W]``, as the loop ends.

        Raises:
            EngineError: why there is none.
        """
        (x,) = await self.results([ticket])
        return x

    async def results(self, tickets: Sequence[Ticket]) -> list[Tensor]:
        """Wait for images ``[1, C, H, W]``, as the loop ends. If one fails, or nobody waits any more, all are given up.

        Raises:
            EngineError: why there is none.
        """
        async with aclosing(self.follow(tickets)) as going:
            async for i, preview in going:
                if preview is None:
                    tickets[i].result(0)
        return [ticket.result(0) for ticket in tickets]

    async def previews(self, ticket: Ticket) -> AsyncIterator[Preview]:
        """Previews as they come, until the image is finished or fails; leaving early cancels the request."""
        async with aclosing(self.follow([ticket])) as going:
            async for _, preview in going:
                if preview is not None:
                    yield preview

    async def follow(self, tickets: Sequence[Ticket]) -> AsyncGenerator[News, None]:
        """Previews of several images as they come, each with its image's place in ``tickets``.

        None in place of a preview says that an image is finished or has failed. Leaving early cancels all that are not.
        """
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[News]()
        for i, ticket in enumerate(tickets):
            ticket.listen(partial(_tell, loop, waiting, i))
        left = len(tickets)
        try:
            while left:
                i, preview = await waiting.get()
                left -= preview is None
                yield i, preview
        finally:
            for ticket in tickets:
                if not ticket.done():
                    ticket.cancel()

    async def generate(self, class_label: int | None = None, **options: Any) -> Tensor:
        """Ask for one image and wait for it: ``[1, C, H, W]`` in [0, 1]. Options and errors: see ``Engine.submit``."""
        ticket = await self.submit(class_label, **options)
        return self.engine.images(await self.result(ticket))

    async def close(self, **options: Any) -> None:
        """See ``Engine.close``."""
        await asyncio.to_thread(self.engine.close, **options)
