"""A server in a process of its own, and what it holds: memory, files, threads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

REAL = ("fastdiff.cli", "serve")
STUB = ("fastdiff.benchmarks.stub_server",)


class Holding(NamedTuple):
    """What a process holds."""

    resident: int  # bytes
    peak: int  # bytes
    threads: int
    files: int


class Server:
    """A running server.

    Args:
        process: it, whose first line on stdout says where it listens.
        seconds: from its start to the answer that it is ready.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, seconds: float, log: Path):
        self.process, self.url, self.seconds, self.log = process, url, seconds, log
        self.host, self.port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)

    def holding(self) -> Holding:
        """What it holds now."""
        folder = Path(f"/proc/{self.process.pid}")
        status = (folder / "status").read_text()

        def field(name: str) -> int:
            found = re.search(rf"{name}:\s+(\d+)", status)
            assert found is not None, name
            return int(found[1])

        files = len(os.listdir(folder / "fd"))
        return Holding(1024 * field("VmRSS"), 1024 * field("VmHWM"), field("Threads"), files)

    def get(self, path: str) -> str:
        """The body of an answer."""
        with urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read."""
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def stop(self, seconds: float = 60.0) -> int:
        """Tell it to end, and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def server(kind: tuple[str, ...], *options: str, **variables: str) -> Iterator[Server]:
    """Start a server at any free port, wait until it is ready, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        log, begin = Path(folder) / "log", time.perf_counter()
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", *kind, "--port", "0", "--json", *options],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(os.environ) | variables,
            )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {log.read_text()}")
            url = json.loads(line)["url"]
            with urlopen(url + "/ready", timeout=60):
                started = Server(process, url, time.perf_counter() - begin, log)
            yield started
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
