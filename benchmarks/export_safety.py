"""How safe engines are: builds killed at random moments, plans with a changed bit. One JSON line for each bar."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.backends.plan_files import manifest_of
from fastdiff.backends.trt import load_engine
from fastdiff.backends.trt_library import Library, find_library
from fastdiff.benchmarks.bars import Bar, at_least, at_most, show
from fastdiff.benchmarks.tiny_graph import tiny_graph
from fastdiff.errors import ArtifactError, FastdiffError
from fastdiff.export.plan_cache import PlanCache
from fastdiff.export.tensorrt import Built, Recipe, build_plan

KILLS, FLIPS, MANIFEST_FLIPS = 200, 10_000, 1_000
SEED = 0


def recipe(number: int) -> Recipe:
    """A recipe of its own for each number, so that nothing is found in the cache."""
    sizes = (8, 8, 16)
    return Recipe(({"batch": (1, 1, 1 + number), "height": sizes, "width": sizes},), ("sm86",))


class Trial(NamedTuple):
    """A build in a process of its own, which writes a byte to ``written`` as it starts to store its engine."""

    pid: int
    stores: int


def start(folder: Path, graph: Path, number: int) -> Trial:
    """Start a build. The parent never builds itself: a library that has threads must not be forked."""
    stores, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(stores)

            def builder(*given: Any, **how: Any) -> Built:
                built = build_plan(*given, **how)
                os.write(told, b"x")
                return built

            PlanCache(folder, find_library("tensorrt_rtx"), builder).get(graph, recipe(number))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(told)
    return Trial(pid, stores)


def finished(trial: Trial) -> int:
    """Wait for a build and return its exit code, negative for a signal."""
    code = os.waitstatus_to_exitcode(os.waitpid(trial.pid, 0)[1])
    os.close(trial.stores)
    return code


def durations(folder: Path, graph: Path) -> tuple[float, float]:
    """Seconds of a whole build and of storing alone."""
    whole, storing = [], []
    for number in range(3):
        begin = time.perf_counter()
        trial = start(folder, graph, 10_000 + number)
        os.read(trial.stores, 1)
        stored = time.perf_counter()
        if finished(trial) != 0:
            raise FastdiffError("a build that nobody killed has failed")
        whole.append(time.perf_counter() - begin)
        storing.append(time.perf_counter() - stored)
    return sorted(whole)[1], sorted(storing)[1]


def kills(count: int, report: dict[str, Any]) -> Iterator[Bar]:
    """Kill builds with SIGKILL, half of them anywhere and half while they store, and look at the cache after each."""
    draw = random.Random(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        folder, graph = Path(scratch) / "plans", tiny_graph(Path(scratch) / "tiny.onnx", np.float16)
        whole, storing = durations(folder, graph)
        cache = PlanCache(folder, find_library("tensorrt_rtx"))
        killed = valid = halves = number = 0
        while killed < count:
            number += 1
            trial = start(folder, graph, number)
            if number % 2:
                os.read(trial.stores, 1)
            time.sleep(draw.uniform(0, storing if number % 2 else whole))
            os.kill(trial.pid, signal.SIGKILL)
            if finished(trial) != -signal.SIGKILL:
                continue  # it was faster
            killed += 1
            halves += bool(list(folder.glob(".*.part")))
            valid += _is_valid(cache) and finished(start(folder, graph, number)) == 0 and _is_valid(cache, clean=True)
        report["kills"] = {"builds": number, "killed": killed, "left_half_an_entry": halves,
                           "seconds_of_a_build": whole, "seconds_of_storing": storing}  # fmt: skip
    yield at_least(f"kills of {count} after which the cache was valid and built again", valid, count)


def _is_valid(cache: PlanCache, clean: bool = False) -> bool:
    """Is every engine that can be seen whole and, where nothing was killed since, nothing half-written left?"""
    try:
        for plan in cache.entries():
            if cache.read(plan)[1].key != plan.parent.name:
                return False
    except ArtifactError:
        return False
    return not (clean and list(cache.folder.glob(".*.part")))


def flips(count: int, manifest_count: int, report: dict[str, Any]) -> Iterator[Bar]:
    """Change single bits of an engine, and of its manifest, and try to load it."""
    library = find_library("tensorrt_rtx")
    reached = [0]

    def deserialize(_: bytes) -> None:
        reached[0] += 1

    counting = SimpleNamespace(
        __version__=library.version,
        ILogger=library.module.ILogger,
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=deserialize),
    )
    with tempfile.TemporaryDirectory() as scratch:
        graph = tiny_graph(Path(scratch) / "tiny.onnx", np.float16)
        if finished(start(Path(scratch) / "plans", graph, 0)) != 0:
            raise FastdiffError("the engine to change was not built")
        (plan,) = PlanCache(Path(scratch) / "plans", library).entries()

        def refused() -> bool:
            try:
                load_engine(plan, torch.device("cuda"), library=Library(library.name, counting))  # type: ignore[arg-type]
            except ArtifactError:
                return True
            except FastdiffError:  # no GPU, or refused by the library: too late
                return False
            return False

        if refused():
            raise FastdiffError("the engine is refused as it is")
        reached[0] = 0
        report["flips"] = {"plan_bytes": plan.stat().st_size, "manifest_bytes": manifest_of(plan).stat().st_size}
        changed = flipped(plan, count, refused)
        in_manifest = flipped(manifest_of(plan), manifest_count, refused)
    yield at_least(f"single-bit changes of {count} in a plan, refused", changed, count)
    yield at_least(f"single-bit changes of {manifest_count} in a manifest, refused", in_manifest, manifest_count)
    yield at_most("changed plans that reached deserialisation", reached[0], 0)


def flipped(file: Path, count: int, refused: Callable[[], bool]) -> int:
    """Change one bit of a file at a time, at random places, and count how often it is refused."""
    draw, size, found = random.Random(SEED), file.stat().st_size, 0
    with file.open("r+b", buffering=0) as held:
        for bit in (draw.randrange(8 * size) for _ in range(count)):
            held.seek(bit // 8)
            (byte,) = held.read(1)
            for value in (byte ^ 1 << bit % 8, byte):
                held.seek(bit // 8)
                held.write(bytes([value]))
                found += value != byte and refused()
    return found


def bars(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """All of them."""
    yield from kills(KILLS // 10 if quick else KILLS, report)
    yield from flips(FLIPS // 10 if quick else FLIPS, MANIFEST_FLIPS // 10 if quick else MANIFEST_FLIPS, report)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.export_safety``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--flips", type=int, default=FLIPS)
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {}

    def chosen() -> Iterator[Bar]:
        yield from kills(options.kills, report)
        yield from flips(options.flips, max(options.flips // 10, 1), report)

    short = show(chosen())
    print(report, file=sys.stderr)
    return short


if __name__ == "__main__":
    sys.exit(main())
