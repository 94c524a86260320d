"""``make check-engine``: what the engine and its server promise in production; one JSON line for each bar."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from fastdiff.benchmarks import bench_engine, killed
from fastdiff.benchmarks.bars import Bar, at_most, command, suite
from fastdiff.benchmarks.churn import churn
from fastdiff.benchmarks.environment import environment
from fastdiff.benchmarks.hostile import URL, Attack, Attacker, by_document, flood, made, made_up, mutated
from fastdiff.benchmarks.server_process import REAL, STUB, Server, server
from fastdiff.engine import Engine
from fastdiff.pipeline import Pipeline

START_SECONDS = 5.0
GROWTH_MIB = 64.0  # of the peak, whatever was sent
DRIFT = 0.01  # of the memory held after the crowd has gone
SUITES = ("tests/test_engine.py", "tests/test_serve.py", "tests/test_serve_prompts.py", "tests/test_serve_live.py",
          "tests/test_ray.py")  # fmt: skip
MIX: tuple[dict[str, Any], ...] = (
    {"sampler": "flow_map", "num_inference_steps": 4},
    {"sampler": "ddim", "num_inference_steps": 10, "guidance_scale": 2.0, "eta": 0.5},
    {"sampler": "dpmpp_2m", "num_inference_steps": 6, "guidance": "apg"},
    {"sampler": "ddpm", "num_inference_steps": 8, "guidance_scale": 3.0, "guidance_interval": (0.5, 5.0)},
    {"sampler": "unipc", "num_inference_steps": 5, "guidance_rescale": 0.5},
    {"sampler": "heun", "num_inference_steps": 3, "guidance_scale": 1.0},
)


def bits(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """Every image alone and among strangers, by the backend that people get."""
    count = 300 if quick else 2000
    pipe = Pipeline.from_pretrained("digits")
    assert isinstance(pipe, Pipeline)
    with Engine(pipe, max_queue=count) as engine:
        asked = [(i % 10, i, MIX[i % len(MIX)]) for i in range(count)]
        tickets = [engine.submit(label, seed=seed, **options) for label, seed, options in asked]
        together = [ticket.result() for ticket in tickets]
        stats, differing = engine.stats(), 0
        for (label, seed, options), crowd in zip(asked, together, strict=True):
            alone = engine.submit(label, seed=seed, **options).result()
            differing += int((alone.view(torch.int32) != crowd.view(torch.int32)).sum())
        report["bits"] = {"promises": engine.promises(), "images_per_step": stats.images / stats.steps}
    yield at_most(f"differing values in {count} pairs of (alone, in company)", differing, 0)
    yield Bar("images in a step while they ran in company", round(stats.images / stats.steps, 2), "> 1",
              stats.images > stats.steps)  # fmt: skip


def start() -> Iterator[Bar]:
    """From the command to the answer that the server is ready."""
    with tempfile.TemporaryDirectory() as folder:
        with server(REAL, FASTDIFF_CACHE=folder):
            pass
        seconds = []
        for _ in range(3):
            with server(REAL, FASTDIFF_CACHE=folder) as running:
                seconds.append(running.seconds)
    yield at_most("server: start to ready with a warm cache, seconds", sorted(seconds)[1], START_SECONDS)


def attacked(name: str, running: Server, attacks: Iterable[Attack], gigabytes: float) -> Iterator[Bar]:
    """Send attacks to a server, and see what it says and holds."""
    before, attacker = running.holding(), Attacker(running)
    for attack in attacks:
        attacker(attack)
    attacker.close()
    answers, bad = attacker.outcome
    flooded = flood(running, URL, gigabytes)
    growth = (running.holding().peak - before.peak) / 2**20
    total = sum(answers.values())
    told = f"{name}: hostile requests that broke off or got 5xx (but 503 with Retry-After), of {total}"
    yield Bar(told, bad or 0, "<= 0", not bad and total > 0)
    yield Bar(f"{name}: answers by status", {str(k): v for k, v in sorted(answers.items())}, "some are images",
              answers[200] > 0)  # fmt: skip
    yield Bar(f"{name}: a body of {gigabytes:g} GB", flooded, "413", " 413 " in flooded)
    yield at_most(f"{name}: growth of the peak memory, MiB", growth, GROWTH_MIB)
    yield Bar(f"{name}: afterwards", running.get("/ready"), "ready", '"ready"' in running.get("/ready"))


def hostile(quick: bool) -> Iterator[Bar]:
    """Requests that nobody means well, to a stub and to the real network."""
    document, nothing, rest, real = (500, 1500, 8000, 200) if quick else (10_000, 30_000, 60_000, 1000)
    with server(STUB, "--log-level", "error") as running:
        schema = json.loads(running.get("/openapi.json"))
        corpus = made(by_document(schema), document) + made(made_up(), nothing)
        attacks = chain(corpus, mutated(corpus, document + nothing + rest - len(corpus)))
        yield from attacked("stub network", running, attacks, 1.0)
    with server(REAL, "--log-level", "error", "--max-steps", "8", "--max-images", "2") as running:
        schema = json.loads(running.get("/openapi.json"))
        corpus = made(by_document(schema), real // 2) + made(made_up(), real // 2)
        yield from attacked("real network", running, chain(corpus, mutated(corpus, real - len(corpus))), 1.0)


def crowd(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """Many clients, of whom a part hangs up."""
    count, warm = (1500, 1000) if quick else (10_000, 3000)
    with server(STUB, "--log-level", "error") as running:
        found = asyncio.run(churn(running, count, warm))
    report["crowd"] = found._asdict()
    name = f"{found.asked} requests, {found.left} hung up"
    yield at_most(f"{name}: not answered once and rightly, or not counted", found.lost(), 0)
    drift = abs(found.after.resident - found.before.resident) / found.before.resident
    yield at_most(f"{name}: memory after over before, difference", drift, DRIFT)
    yield at_most(f"{name}: threads more than before", found.after.threads - found.before.threads, 0)
    yield at_most(f"{name}: files more than before", found.after.files - found.before.files, 0)


def bars(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """All of them."""
    report |= {"environment": environment(torch.device("cpu"))}
    yield from bits(quick, report)
    yield from start()
    yield from hostile(quick)
    yield from crowd(quick, report)
    yield from killed.bars(quick, report)
    yield from bench_engine.bars(quick, report)
    yield suite("the engine's and the server's own tests", *SUITES)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.check_engine``."""
    return command("check-engine", __doc__.split("\n")[0], "fewer requests", bars, arguments)


if __name__ == "__main__":
    sys.exit(main())
