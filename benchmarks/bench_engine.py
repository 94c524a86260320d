"""Servers under load: ``fastdiff serve`` beside diffusers behind FastAPI, with a lock and with whole-request batching.

``python -m fastdiff.benchmarks.bench_engine --out engine.json``. Every server is a process of its own and speaks HTTP;
they take turns, one loaded at a time, with the same requests: steps of 4, 10 and 20 in equal parts. Figures in the
manner of MLPerf inference: single stream (one request after the other, 90th percentile), server (Poisson arrivals, 99th
percentile) and offline (all at once, images a second).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import torch

from fastdiff.benchmarks.bars import Bar, at_least, at_most
from fastdiff.benchmarks.environment import environment, quantile, write_json

STEPS = (4, 10, 20)
OURS, LOCK, BATCHING = "fastdiff serve", "diffusers with a lock", "diffusers, whole-request batching"
PATIENCE = 120.0  # seconds for one answer, and for a start
LOAD = 0.8  # of the lock server's capacity
TOGETHER = 16  # requests that are under way when all come at once


class Sizes(NamedTuple):
    """How much is asked."""

    stream: int  # requests one after the other
    offline: int  # requests at once
    seconds: float  # of one round of arrivals
    rounds: int


FULL, QUICK = Sizes(60, 96, 90.0, 3), Sizes(12, 32, 35.0, 1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def commands(port: int) -> dict[str, list[str]]:
    """How each server is started."""
    peer = [sys.executable, "-m", "fastdiff.benchmarks.peer_servers", "--port", str(port), "--kind"]
    ours = [sys.executable, "-m", "fastdiff.cli", "serve", "--model", "digits", "--port", str(port)]
    return {OURS: ours, LOCK: [*peer, "lock"], BATCHING: [*peer, "batching"]}


@contextlib.contextmanager
def served(name: str) -> Iterator[tuple[str, float]]:
    """Run a server: its address, and the seconds until it was ready."""
    port = free_port()
    address, begin = f"http://127.0.0.1:{port}", time.monotonic()
    process = subprocess.Popen(commands(port)[name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/ready").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - begin > PATIENCE:
                raise RuntimeError(f"{name} did not start (exit code {process.poll()})")
            time.sleep(0.05)
        yield address, time.monotonic() - begin
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Mixed requests, the same for the same seed."""
    draw = random.Random(seed)
    return [
        {
            "class_label": draw.randrange(10),
            "num_inference_steps": draw.choice(STEPS),
            "seed": draw.randrange(2**31),
            "sampler": "ddim",
        }  # Euler's method on this path, as in the peers
        for _ in range(count)
    ]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """Seconds from the request to the whole answer.

    Raises:
        RuntimeError: if the answer is not an image.
    """
    begin = time.perf_counter()
    answer = await client.post("/v1/images/generations", json=body)
    if answer.status_code != 200 or not answer.json()["data"][0]["b64_json"]:
        raise RuntimeError(f"status {answer.status_code}: {answer.text[:200]}")
    return time.perf_counter() - begin


def client_of(address: str) -> httpx.AsyncClient:
    """A client that opens as many connections as it needs."""
    return httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=httpx.Limits(max_connections=None))


async def stream(address: str, bodies: Sequence[dict[str, Any]]) -> list[float]:
    """One request after the other."""
    async with client_of(address) as client:
        return [await ask(client, body) for body in bodies]


async def offline(address: str, bodies: Sequence[dict[str, Any]]) -> float:
    """All at once, so many of them under way: images a second."""
    gate = asyncio.Semaphore(TOGETHER)

    async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with gate:
            await ask(client, body)

    async with client_of(address) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client, body) for body in bodies))
        return len(bodies) / (time.perf_counter() - begin)


async def arrivals(address: str, rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals at a rate; the seconds that each answer took. Arrivals do not wait for answers."""
    draw, times, at = random.Random(seed), list[float](), 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    bodies, begin = requests(len(times), seed), time.perf_counter()

    async def one(client: httpx.AsyncClient, when: float, body: dict[str, Any]) -> float:
        await asyncio.sleep(max(0.0, begin + when - time.perf_counter()))
        return await ask(client, body)

    async with client_of(address) as client:
        return list(await asyncio.gather(*(one(client, *pair) for pair in zip(times, bodies, strict=True))))


def measure(sizes: Sizes) -> dict[str, Any]:
    """Every server's figures."""
    names = (OURS, LOCK, BATCHING)
    found: dict[str, Any] = {name: {"latencies": []} for name in names}
    with contextlib.ExitStack() as stack:
        addresses = {}
        for name in names:
            addresses[name], found[name]["start_s"] = stack.enter_context(served(name))
        for name in names:
            asyncio.run(stream(addresses[name], requests(6, 0)))  # warm
            alone = asyncio.run(stream(addresses[name], requests(sizes.stream, 1)))
            found[name]["single_stream_p90_ms"] = 1e3 * quantile(alone, 0.9)
        for turn in range(2):
            for name in names:
                speed = asyncio.run(offline(addresses[name], requests(sizes.offline, 2 + turn)))
                found[name]["images_per_s"] = max(speed, found[name].get("images_per_s", 0.0))
        rate = LOAD * found[LOCK]["images_per_s"]
        for turn in range(sizes.rounds):
            for name in names:
                found[name]["latencies"] += asyncio.run(arrivals(addresses[name], rate, sizes.seconds, 10 + turn))
    for name in names:
        taken = found[name].pop("latencies")
        found[name] |= {
            "requests": len(taken),
            "p50_ms": 1e3 * quantile(taken, 0.5),
            "p99_ms": 1e3 * quantile(taken, 0.99),
        }
    return {"requests_per_s": rate, "servers": found}


def bars(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """What the engine has to be beside its peers."""
    result = measure(QUICK if quick else FULL)
    report["load"] = result
    ours, lock, batching = (result["servers"][name] for name in (OURS, LOCK, BATCHING))
    yield at_most("p99 latency over whole-request batching's", ours["p99_ms"] / batching["p99_ms"], 0.5)
    yield at_most("p99 latency over the lock server's", ours["p99_ms"] / lock["p99_ms"], 0.3)
    yield at_least("capacity over the lock server's", ours["images_per_s"] / lock["images_per_s"], 1.3)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.bench_engine``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer requests and shorter rounds")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    result = measure(QUICK if options.quick else FULL) | {"environment": environment(torch.device("cpu"))}
    print(f"Poisson arrivals, {result['requests_per_s']:.2f} requests a second of 4, 10 or 20 steps")
    print(f"{'server':36}{'p50':>9}{'p99':>9}{'single p90':>12}{'offline':>12}")
    for name, row in result["servers"].items():
        print(
            f"{name:36}{row['p50_ms']:6.0f} ms{row['p99_ms']:6.0f} ms{row['single_stream_p90_ms']:9.0f} ms"
            f"{row['images_per_s']:8.2f}/s"
        )
    if options.out:
        write_json(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
