"""``make check-cpu``: how fast the CPU backend is beside every other runtime; one JSON line for each bar."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastdiff.benchmarks.bars import Bar, at_most, command, suite
from fastdiff.benchmarks.environment import environment
from fastdiff.benchmarks.peers import QUICK, Case, measure
from fastdiff.benchmarks.runtimes import RUNTIMES
from fastdiff.benchmarks.scaling import by_batch, by_size, worst_step

ERROR = 1e-4  # of an output, relative to a float64 run
GUARD = "tests/test_native.py::test_the_plan_for_a_table_of_times"
# layout, batch, bound to diffusers, bound to the best other runtime
SPEED = (("ddpm-cifar", 1, 0.45, 0.65), ("ddpm-cifar", 16, 0.40, 0.60), ("sd15", 1, 0.45, 0.65))
GROWTH = 1.15  # seconds per image, or per pixel, of a step of the curve over those of the step before
COLD = """
import json, time
begin = time.perf_counter()
import fastdiff
pipe = fastdiff.Pipeline.from_pretrained("digits")
pipe([3], num_inference_steps=4, seed=0)
print(json.dumps(time.perf_counter() - begin))
"""
PEAK = """
import json, re, sys
from pathlib import Path
import torch
from fastdiff.benchmarks.layouts import SD15
from fastdiff.benchmarks.peers import network_of
from fastdiff.benchmarks.runtimes import as_the_loop_calls, diffusers
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet
inputs = {"sample": torch.randn(1, 4, 64, 64), "timestep": torch.tensor(500.0),
          "encoder_hidden_states": torch.randn(1, 77, 768)}
with torch.no_grad():
    if sys.argv[1] == "diffusers":
        run = diffusers(network_of("sd15"), inputs, None)
    else:
        run = as_the_loop_calls(UNet(UNetConfig.from_dict(SD15)), inputs)
    for _ in range(2):
        run(inputs["sample"], inputs["timestep"])
# not getrusage's: a child begins with its parent's
print(json.dumps(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])))
"""


def alone(code: str, *arguments: str, **variables: str) -> float:
    """What a fresh process prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        env=dict(os.environ) | variables,
    )  # fmt: skip
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def speed(quick: bool, details: list[dict[str, Any]]) -> Iterator[Bar]:
    """One evaluation beside every runtime."""
    for layout, batch, to_diffusers, to_best in SPEED:
        large = layout == "sd15"
        names = [name for name in RUNTIMES if name in QUICK or not (quick or large)]
        rounds = (3 if quick else 7) if large or batch > 1 else (9 if quick else 21)
        result = measure(Case(layout, batch, ddim=not large and batch == 1 and not quick), names, rounds)
        details.append(result)
        (row,) = (row for row in result["rows"] if row["runtime"] == "fastdiff")
        name = f"{layout} batch {batch}"
        yield at_most(f"{name}: time over diffusers'", row["ratio"], to_diffusers)
        yield at_most(f"{name}: time over {row['best_other']}'s", row["ratio_to_best_other"], to_best)
        yield at_most(f"{name}: relative error", row["error"], ERROR)


def digits(quick: bool, details: list[dict[str, Any]]) -> Iterator[Bar]:
    """Whole runs of the bundled model."""
    result = measure(
        Case("digits", 1, ddim=True), [n for n in RUNTIMES if n in QUICK or not quick], 15 if quick else 31
    )
    details.append(result)
    (row,) = (row for row in result["rows"] if row["runtime"] == "fastdiff")
    yield at_most("digits: DDIM-20 over diffusers'", row["ddim_ratio"], 0.35)
    yield at_most("digits: difference of the images", row["ddim_difference"], ERROR)


def cold_start() -> Iterator[Bar]:
    """From import to the first image, with what earlier runs kept on disk and without."""
    with tempfile.TemporaryDirectory() as folder:
        first = alone(COLD, FASTDIFF_CACHE=folder)
        later = sorted(alone(COLD, FASTDIFF_CACHE=folder) for _ in range(5))[2]
    yield at_most("cold start without a cache, seconds", first, 20)
    yield at_most("cold start with a warm cache, seconds", later, 3)


def memory() -> Iterator[Bar]:
    """Peak memory of a process that runs SD 1.5 in full size."""
    yield at_most("sd15: peak memory over diffusers'", alone(PEAK, "fastdiff") / alone(PEAK, "diffusers"), 1.3)


def growth(quick: bool, curves: dict[str, Any]) -> Iterator[Bar]:
    """Time per image by batch and per pixel by size."""
    rounds = 5 if quick else 11
    curves |= {"by_batch": by_batch(rounds), "by_size": by_size(rounds)}
    yield at_most("digits: most that a doubled batch costs per image", worst_step(curves["by_batch"]), GROWTH)
    yield at_most("digits: most that a larger size costs per pixel", worst_step(curves["by_size"]), GROWTH)


def bars(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """All of them."""
    report |= {"environment": environment(torch.device("cpu")), "cases": [], "curves": {}}
    yield from speed(quick, report["cases"])
    yield from digits(quick, report["cases"])
    yield from cold_start()
    yield from memory()
    yield from growth(quick, report["curves"])
    yield suite("the plan for a fixed table of times", GUARD)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.check_cpu``."""
    return command("check-cpu", __doc__.split("\n")[0], "fewer rounds, no torch.compile", bars, arguments)


if __name__ == "__main__":
    sys.exit(main())
