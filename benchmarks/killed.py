"""SIGKILL on Ray: replicas under load, drivers and workers of an offline run. Who was answered, and what was made."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from fastdiff.benchmarks.bars import Bar, at_least, at_most
from fastdiff.benchmarks.churn import ask, picture
from fastdiff.benchmarks.server_process import REAL, Server, server
from fastdiff.engine import Engine
from fastdiff.serve.encode import encode
from fastdiff.serve.ray.source import Source

REPLICA, WORKER = "ray::ServeReplica", "ray::MapWorker"  # names of Ray's processes
CLIENTS = 12  # at once
KINDS = 16  # different requests
SAMPLERS = ("ddim", "dpmpp_2m", "flow_map", "ddpm")
PAUSE = (0.5, 3.0)  # seconds of load before a kill
PATIENCE = 120.0  # seconds for processes to come or go


class Load(NamedTuple):
    """What came of requests while replicas were killed."""

    asked: int
    outcomes: Counter[str]  # "image", "told" that its replica was lost, or what was wrong
    kills: int
    finished: Counter[str]  # how often replicas say that they answered a request, by its id


def below(process: int, name: str = "") -> list[psutil.Process]:
    """The processes that a process has started, and those that these have, whose names begin with ``name``."""
    try:
        found = psutil.Process(process).children(recursive=True)
        return [child for child in found if _name(child).startswith(name)]
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def still_there(processes: Sequence[psutil.Process], seconds: float = 90.0) -> int:
    """How many of some processes have not ended after a while; two of Ray's look for their parent every half minute."""
    end = time.monotonic() + seconds
    while (count := sum(map(_runs, processes))) and time.monotonic() < end:
        time.sleep(0.2)
    return count


def _runs(process: psutil.Process) -> bool:
    """Does it run? A dead one may stay in the list where nobody asks for its exit code."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def requests() -> list[dict[str, Any]]:
    """Different requests, long enough to be killed on the way; every fourth is a stream."""
    return [
        {"class_label": i % 10, "seed": i, "num_inference_steps": 12, "sampler": SAMPLERS[i % len(SAMPLERS)],
         "guidance_scale": 1.0 + i % 2, "stream": i % 4 == 0}
        for i in range(KINDS)
    ]  # fmt: skip


def pictures(engine: Engine, bodies: Sequence[dict[str, Any]]) -> list[str]:
    """What an engine that nobody kills draws for requests, in base64."""
    tickets = [engine.submit(**{k: v for k, v in body.items() if k != "stream"}) for body in bodies]
    return [encode(engine.images(ticket.result(), "pil")[0], "png", None) for ticket in tickets]


def outcome(answer: bytes, expected: str) -> str:
    """One word on an answer: the right image, or told to come again; else what it was."""
    whole = answer.count(b"HTTP/1.1") == 1
    if whole and b"HTTP/1.1 503" in answer and b"retry-after:" in answer and b'"code":"unavailable"' in answer:
        return "told"
    if whole and b"event: error" in answer and b'"code": "unavailable"' in answer and b".completed" not in answer:
        return "told"
    got = picture(answer)
    return "image" if got == expected else f"wrong: {got[:80]}"


async def under_load(running: Server, kills: int, expected: Sequence[str], key: str = "") -> Load:
    """Kill replicas while clients ask; who is told that a replica was lost asks again."""
    bodies, draw, outcomes = requests(), random.Random(0), Counter[str]()
    asked, going = 0, True

    async def client() -> None:
        nonlocal asked
        again = None
        while going or again is not None:
            kind = draw.randrange(KINDS) if again is None else again
            name, asked = f"asked-{asked}", asked + 1
            try:
                # what waits for a replica that is being started waits long where many want the cores
                headers = {"x_request_id": name, "authorization": f"Bearer {key}"}
                told = outcome(await ask(running, bodies[kind], 2 * PATIENCE, **headers), expected[kind])
            except (TimeoutError, OSError) as error:
                told = f"wrong: {type(error).__name__}"
            outcomes[told] += 1
            again = kind if told == "told" else None

    async def killer() -> None:
        nonlocal going
        for _ in range(kills):
            await asyncio.sleep(draw.uniform(*PAUSE))
            there = await _replicas(running)
            draw.choice(there).kill()
            before = {process.pid for process in there}
            while {process.pid for process in await _replicas(running, len(there))} == before:
                await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
        going = False

    await asyncio.gather(killer(), *(client() for _ in range(CLIENTS)))
    await asyncio.sleep(2.0)  # for the last lines of the log
    return Load(asked, outcomes, kills, finished(running.log))


async def _replicas(running: Server, count: int = 1) -> list[psutil.Process]:
    """The replicas of a server, as soon as there are so many."""
    end = time.monotonic() + PATIENCE
    while len(found := below(running.process.pid, REPLICA)) < count:
        if time.monotonic() > end:
            raise RuntimeError(f"{len(found)} replicas after {PATIENCE:g} s; expected {count}")
        await asyncio.sleep(0.2)
    return found


def finished(log: Path) -> Counter[str]:
    """How often replicas say that they answered a request with images, by its id."""
    found = Counter[str]()
    for line in log.read_text().splitlines():
        if '"message": "request"' in line:
            facts = json.loads(line[line.index("{") :])
            found[facts["request_id"]] += facts["status"] == 200
    return found


def replicas_killed(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """The server on Ray, with replicas killed under load."""
    before = torch.get_num_threads()
    with Engine(Source("digits").load(threads=1)) as engine:
        expected = pictures(engine, requests())
    torch.set_num_threads(before)
    with server(REAL, "--ray", "--replicas", "2", "--cpus-per-replica", "1") as running:
        found = asyncio.run(under_load(running, 2 if quick else 12, expected))
        processes = below(running.process.pid)
        code = running.stop()
    report["replicas killed"] = found._asdict() | {"finished": found.finished.total()}
    name = f"Ray: {found.kills} replicas killed under {found.asked} requests"
    lost = found.asked - found.outcomes["image"] - found.outcomes["told"]
    yield at_most(f"{name}: not answered once, by the unkilled engine's bits or 503 with Retry-After", lost, 0)
    yield at_least(f"{name}: told that their replica was lost, and given the image when they asked again",
                   found.outcomes["told"], 1)  # fmt: skip
    twice = sum(count > 1 for count in found.finished.values())
    yield Bar(f"{name}: finished by two replicas", f"{twice} of {found.finished.total()} in their logs", "0 of some",
              not twice and bool(found.finished))  # fmt: skip
    left = still_there(processes)
    yield Bar("Ray: after SIGTERM", f"exit {code}, {left} processes left", "exit 0, 0 processes left", code + left == 0)


class Run:
    """An offline run in a process of its own."""

    def __init__(self, table: Path, out: Path):
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastdiff.cli", "batch", str(table), "--out", str(out), "--json",
             "--cpus-per-worker", "1", "--max-batch", "4"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def reached(self, files: int) -> bool:
        """Wait until there are so many files; False: it ended before."""
        while len(list(self.out.glob("*.png"))) < files:
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> list[psutil.Process]:
        """Kill the driver alone; what it had started."""
        started = below(self.process.pid)
        self.process.kill()
        self.process.communicate()
        return started

    def finish(self) -> dict[str, Any]:
        """Wait for it; what it says."""
        text = self.process.communicate(timeout=1200)[0]
        lines = [line for line in text.splitlines() if line.startswith("{")]
        return {"code": self.process.returncode} | (json.loads(lines[-1]) if lines else {})


def write_table(file: Path, rows: int) -> None:
    """A table of different rows."""
    lines = [f"{i % 10},{1000 + i},{4 + i % 12},{SAMPLERS[i % len(SAMPLERS)]}" for i in range(rows)]
    file.write_text("\n".join(["class_label,seed,num_inference_steps,sampler", *lines]) + "\n")


def differing(one: Path, other: Path) -> int:
    """Files that two folders do not share byte for byte."""
    ours, theirs = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (one, other))
    return sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())


def batch_killed(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """An offline run whose driver and workers are killed, beside one that nobody touched."""
    rows, drivers, workers = (120, 1, 1) if quick else (2000, 8, 8)
    draw, killed = random.Random(1), Counter[str]()
    orphans: list[psutil.Process] = []
    with tempfile.TemporaryDirectory() as folder:
        table, whole, resumed = (Path(folder) / name for name in ("table.csv", "whole", "resumed"))
        write_table(table, rows)
        Run(table, whole).finish()
        moments = sorted(draw.sample(range(1, rows - rows // 10), drivers + workers))
        kinds = draw.sample(["driver"] * drivers + ["worker"] * workers, drivers + workers)
        run = Run(table, resumed)
        for moment, kind in zip(moments, kinds, strict=True):
            if not run.reached(moment):
                break
            killed[kind] += 1
            if kind == "driver":
                orphans += run.kill()
                run = Run(table, resumed)
            else:
                draw.choice(below(run.process.pid, WORKER)).kill()
        last = run.finish()
        report["batch killed"] = {"rows": rows, "killed": killed, "last run": last}
        made = len(list(whole.glob("*.png")))
        hit = killed.total()
        name = f"Ray: a table of {rows} rows, {killed['driver']} drivers and {killed['worker']} workers killed"
        yield Bar(f"{name}: files of a run in one go", made, f"{rows}", made == rows)
        yield at_most(f"{name}, resumed: files that differ from that run's", differing(whole, resumed), 0)
        yield Bar(f"{name}: kills that hit", hit, f"{drivers + workers}", hit == drivers + workers)
        yield at_most(f"{name}: processes left by killed drivers", still_there(orphans), 0)
        again = Run(table, resumed).finish()
        told = f"{again.get('drawn')} drawn, {again.get('kept')} kept"
        yield Bar(f"{name}: run once more", told, f"0 drawn, {rows} kept", told == f"0 drawn, {rows} kept")


def bars(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """All of them."""
    yield from replicas_killed(quick, report)
    yield from batch_killed(quick, report)
