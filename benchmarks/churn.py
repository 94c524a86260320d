"""Many clients at once, of whom a part hangs up at random: who was answered, with what, and what the server keeps."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any, NamedTuple

from fastdiff.benchmarks.hostile import URL
from fastdiff.benchmarks.server_process import Holding, Server

CLIENTS = 24  # at once
KINDS = 60  # different requests
LEAVING = 0.3  # share of clients that hang up
PATIENCE = 0.05  # seconds, at most, until they do
SAMPLERS = ("ddim", "dpmpp_2m", "flow_map", "heun", "ddpm")


class Churn(NamedTuple):
    """What came of it."""

    asked: int
    left: int  # clients that hung up
    outcomes: Counter[str]  # of the others: "right", or what was wrong
    counted: int  # requests that the server counted
    images: int  # images that the engine answered, whatever the outcome
    idle: bool  # nothing waits, nothing runs
    before: Holding
    after: Holding

    def lost(self) -> int:
        """Clients that were not answered once and rightly, and requests that the server did not count."""
        stayed = self.asked - self.left
        return stayed - self.outcomes["right"] + abs(self.asked - self.counted) + (not self.idle)


def kinds() -> list[dict[str, Any]]:
    """Different requests: samplers, steps, guidance, streams."""
    draw = random.Random(0)
    return [
        {"class_label": draw.randrange(10), "seed": i, "num_inference_steps": draw.randrange(2, 20),
         "sampler": SAMPLERS[i % len(SAMPLERS)], "guidance_scale": draw.choice([1.0, 2.0]), "stream": i % 2 == 0,
         **({"partial_images": 2} if i % 4 == 0 else {})}
        for i in range(KINDS)
    ]  # fmt: skip


async def ask(server: Server, body: dict[str, Any], patience: float | None = None, **headers: str) -> bytes:
    """The whole of what a server sends, until it closes the connection; less, if patience runs out.

    Args:
        server: to ask.
        body: of the request.
        patience: in seconds.
        headers: of the request, with underscores for hyphens.
    """
    text = json.dumps(body).encode()
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = (f"POST {URL} HTTP/1.1\r\nhost: {server.host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(text)}\r\nconnection: close\r\n{more}\r\n")  # fmt: skip
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(head.encode() + text)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 120.0 if patience is None else patience)
    finally:
        writer.transport.abort()


def picture(answer: bytes) -> str:
    """The image of an answer, or what is wrong with it."""
    if answer.count(b"HTTP/1.1 200") != 1:
        return f"{answer.count(b'HTTP/1.1')} answers: {answer[:40]!r}"
    finals = [part for part in answer.split(b"\n\n") if b"image_generation.completed" in part] or [answer]
    if len(finals) != 1 or finals[0].count(b'"b64_json"') != 1:
        return f"{len(finals)} images"
    return finals[0].split(b'"b64_json"')[1].split(b'"')[1].decode()


async def _crowd(server: Server, count: int, expected: list[str], seed: int) -> tuple[int, Counter[str]]:
    draw, outcomes, left = random.Random(seed), Counter[str](), 0
    asked, numbers = kinds(), iter(range(count))

    async def client() -> None:
        nonlocal left
        for i in numbers:
            leaves, patience = draw.random() < LEAVING, draw.uniform(0, PATIENCE)
            body = asked[i % KINDS]
            if leaves:
                left += 1
                try:
                    await ask(server, body, patience)
                except (TimeoutError, OSError):
                    pass
                continue
            try:
                got = picture(await ask(server, body))
            except (TimeoutError, OSError) as error:
                got = type(error).__name__
            outcomes["right" if got == expected[i % KINDS] else f"wrong: {got[:60]}"] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return left, outcomes


async def _settled(server: Server) -> bool:
    """Wait until nothing runs; whether that came about."""
    for _ in range(200):
        found = await asyncio.to_thread(server.metrics)
        if found["fastdiff_waiting_images"] + found["fastdiff_running_images"] == 0:
            return True
        await asyncio.sleep(0.1)
    return False


def _counted(found: dict[str, float]) -> int:
    return int(sum(v for k, v in found.items() if k.startswith(f'fastdiff_request_seconds_count{{route="{URL}"')))


def _images(found: dict[str, float]) -> int:
    return int(sum(v for k, v in found.items() if k.startswith("fastdiff_images_total")))


async def churn(server: Server, count: int, warm: int) -> Churn:
    """Let a crowd of clients ask for ``count`` images, after ``warm`` that fill the process's pools and caches."""
    expected = [picture(await ask(server, body)) for body in kinds()]
    await _crowd(server, warm, expected, seed=1)
    await _settled(server)
    await asyncio.sleep(1.0)  # connections of the last ones are closed
    first, before = server.metrics(), server.holding()
    left, outcomes = await _crowd(server, count, expected, seed=2)
    idle = await _settled(server)
    await asyncio.sleep(1.0)
    last, after = server.metrics(), server.holding()
    return Churn(
        count, left, outcomes, _counted(last) - _counted(first), _images(last) - _images(first), idle, before, after
    )
