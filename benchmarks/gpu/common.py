"""What the parts of the GPU suite share: the file that a part writes, and capture in a CUDA graph."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdiff.benchmarks.environment import environment, write_json
from fastdiff.graph import CUDA
from fastdiff.kernels import REFERENCE, Ops, triton_ops
from fastdiff.models.files import read_json

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python -m fastdiff.benchmarks.gpu_suite --out DIR"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPS: dict[str, Callable[[], Ops]] = {"reference": lambda: REFERENCE, "triton": triton_ops}
INTERPRETER = "interpreter"
DONE = "done"
OUTCOMES = ("ok", "equal", "equal_after_swap", "raised")  # an entry in which one of these is false is wrong
SAME = ("source", "device", "versions")  # a part goes on where an earlier run stopped only if these are equal


def source() -> str:
    """A digest of the project's Python files: figures of other code must not pass for this one's."""
    digest = hashlib.sha256()
    for folder in ("fastdiff", "kernels", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def facts(device: torch.device) -> dict[str, Any]:
    """What holds for every entry of a part; on a CPU the device is Triton's interpreter."""
    found = environment(device)
    name = found["device"] if device.type == "cuda" else INTERPRETER
    return {"device": name, "versions": found["versions"], "source": source(), "environment": found}


def failed(entry: dict[str, Any]) -> bool:
    """Did an entry break off, or come out wrong?"""
    return "failed" in entry or not all(entry.get(outcome, True) for outcome in OUTCOMES)


class Report:
    """One part's file: written whole after every entry, so that a killed part leaves what it had.

    Entries that an earlier run of the same code on the same device left, and that were right, are kept and not
    measured again.

    Args:
        file: where to write.
        seconds: after which no further entry is begun.
        facts: what holds for every entry.
    """

    def __init__(self, file: Path, seconds: float, facts: dict[str, Any]):
        self.file, self.until = file, time.monotonic() + seconds
        earlier = read_json(file) if file.exists() else {}
        same = earlier.get("part") == file.stem and all(earlier.get(key) == facts.get(key) for key in SAME)
        kept = [entry for entry in earlier.get("entries", []) if not failed(entry)] if same else []
        self.value: dict[str, Any] = {"part": file.stem, "command": COMMAND, "status": "running", **facts}
        self.value |= {"entries": kept, "not_run": []}
        self.write()

    def write(self) -> None:
        """Write the file as it stands."""
        write_json(self.file, self.value)

    def holds(self, label: dict[str, Any]) -> bool:
        """Is there an entry of this label?"""
        return any(label.items() <= entry.items() for entry in self.value["entries"])

    def add(self, label: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one entry, or say that it failed or that the time was up. A failure does not end the part."""
        if self.holds(label):
            return
        if time.monotonic() >= self.until:
            self.value["not_run"].append(label)
        else:
            try:
                self.value["entries"].append(label | measure())
            except Exception as reason:  # of whatever kind: the other entries are worth having
                self.value["entries"].append(label | {"failed": f"{type(reason).__name__}: {str(reason)[:300]}"})
        self.write()


def capture(fn: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Warm ``fn`` up, capture it in a CUDA graph and return the replay; on a CPU return ``fn``.

    The replay returns what ``fn`` returned, in the same memory every time.
    """
    if device.type != "cuda":
        return fn
    with CUDA.on(device):
        graph, result = CUDA.record(fn, None)

    def replay() -> Any:
        graph.replay()
        return result

    return replay
