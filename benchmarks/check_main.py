"""``make check-main``: measure every bar of the main job afresh, one JSON line each; exit 1 if any falls short.

With ``--quick`` the same bars are measured on fewer images and rounds, and the fast tests stand for the whole suite.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastdiff.benchmarks.bars import ROOT, Bar, at_least, at_most, show, suite
from fastdiff.benchmarks.orders import PATHS as ORDER_PATHS
from fastdiff.benchmarks.orders import gaussian, measured_order, run, smooth_times
from fastdiff.benchmarks.quality import (
    judge,
    load_classifier,
    nearest_distances,
    quantiles,
    reference_figures,
    reference_moments,
)
from fastdiff.benchmarks.table import NEAREST, diffusers_arm, draw_many, fastdiff_arm, time_arms
from fastdiff.models.weights import load_model
from fastdiff.pipeline import Pipeline, resolve
from fastdiff.sampling.path import RectifiedFlow
from fastdiff.sampling.prediction import PREDICTIONS, Velocity
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.training import load_images


def quality(samples: int, data: Path | None) -> Iterator[Bar]:
    """Frechet distances and recognition of the flow map against the 50-step sampler of the same network."""
    folder = resolve("digits")
    pipe, classifier, test = Pipeline.from_pretrained(folder), load_classifier(), reference_moments("test")
    real = reference_figures()["real_to_real_by_count"][str(samples)]
    yield Bar("real-to-real Frechet distance", real, "for comparison", True)
    base = math.nan
    bounds = {50: (10.0, 0.99), 4: (1.3, 0.98), 2: (2.0, 0.97), 1: (4.0, 0.93)}
    for steps, (ratio, accuracy) in bounds.items():
        images, labels = draw_many(fastdiff_arm(pipe, "eager", "ddim" if steps == 50 else "flow_map", steps), samples)
        judged = judge(images, labels, test, classifier)
        name = f"Frechet distance, {steps} steps, {samples} images"
        yield Bar(name, round(judged.frechet, 2), "for comparison", True)
        if steps == 50:
            base = judged.frechet
            yield at_most("50 steps: Frechet distance over real-to-real", judged.frechet / real, ratio)
        else:
            yield at_most(f"flow map, {steps} steps: Frechet distance over 50 steps", judged.frechet / base, ratio)
        yield at_least(f"{steps} steps: class recognised", judged.accuracy, accuracy)
        if steps == 4 and data is not None:
            everything = load_images(data, 28)
            training = everything.batch(torch.arange(len(everything.labels) - 5000))
            near = quantiles(nearest_distances(images[:NEAREST], training))
            held = reference_figures()["nearest"]["validation"]
            yield at_least("closest training image of 1000 samples, over that of real digits",
                           near["0.0"] / held["0.0"], 0.5)  # fmt: skip


def latency(rounds: int) -> Iterator[Bar]:
    """The 4-step flow map against the diffusers code, interleaved; outputs of both at 50 steps are compared."""
    folder = resolve("digits")
    info = load_model(folder).info
    pipe = Pipeline.from_pretrained(folder)
    peer = diffusers_arm(folder, float(info.guidance_scale), int(info.null_label or 0), info.crop)
    arms = [peer, fastdiff_arm(pipe, "eager", "flow_map", 4)]
    theirs, ours = time_arms(arms, 1, rounds, "latency")
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    yield at_least("latency: diffusers 50 steps over flow map 4 steps, batch 1", statistics.median(ratios), 10)
    import diffusers

    sigmas = diffusers.FlowMatchEulerDiscreteScheduler()
    sigmas.set_timesteps(50)
    latents = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    same = pipe([1, 2, 3, 4], latents=latents, sampler="ddim", sigmas=sigmas.sigmas.tolist(), output_type="pt").images
    difference = float((same * 2 - 1 - peer.draw([1, 2, 3, 4], latents)).abs().max())
    yield at_most("same weights, noise and times: largest difference to diffusers' images", difference, 1e-4)


def oracles() -> Iterator[Bar]:
    """Agreement of predictions, measured orders, exactness of the flow map, on Gaussian data in float64."""
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = jump = 0.0
    for path in ORDER_PATHS.values():
        times = smooth_times(path, 7)
        truth = run(path, PREDICTIONS["x0"], SOLVERS["dpmpp_2m"](), times, x)
        for name, prediction in PREDICTIONS.items():
            if prediction.two_time:
                landed = run(path, prediction, SOLVERS["flow_map"](), times, x)
                exact = gaussian().flow(path, x, times[0], times[-1])
                jump = max(jump, float((landed - exact).abs().max()))
            elif not prediction.jumps:
                got = run(path, PREDICTIONS[name], SOLVERS["dpmpp_2m"](), times, x)
                spread = max(spread, float((got - truth).abs().max()))
    yield at_most("predictions agree (float64)", spread, 1e-12)
    yield at_most("flow map is exact (float64)", jump, 1e-12)
    for name, order in (("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)):
        measured = measured_order(RectifiedFlow(), Velocity(), SOLVERS[name]())
        yield Bar(f"order of {name}", round(measured, 3), f"{order} +- 0.25", abs(measured - order) <= 0.25)


def bad_input() -> Iterator[Bar]:
    """Every kind of bad input through the command line: one line, exit code 2, nothing written."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        np.save(place / "nan.npy", np.full((1, 1, 32, 32), np.nan, dtype=np.float32))
        for kind in ("truncated", "foreign"):
            (place / kind).mkdir()
            for file in resolve("digits").iterdir():
                (place / kind / file.name).write_bytes(file.read_bytes())
        weights = "diffusion_pytorch_model.safetensors"
        (place / "truncated" / weights).write_bytes((place / "truncated" / weights).read_bytes()[:100_000])
        (place / "foreign" / weights).write_bytes((ROOT / "benchmarks/classifier.safetensors").read_bytes())
        (place / "folder.onnx").mkdir()
        cases = {
            "unknown sampler": ["--sampler", "dimm"],
            "steps 0": ["--steps", "0"],
            "label 11": ["--class-labels", "11"],
            "NaN latents": ["--class-labels", "1", "--latents", str(place / "nan.npy")],
            "truncated safetensors": ["--model", str(place / "truncated")],
            "foreign safetensors": ["--model", str(place / "foreign")],
            "file instead of a folder": ["--model", str(place / "nan.npy")],
            "folder instead of a file": ["--backend", "onnxruntime", "--artifact", str(place / "folder.onnx")],
        }
        for name, arguments in cases.items():
            command = [sys.executable, "-m", "fastdiff.cli", "generate", "--out", str(place / "out"), *arguments]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True)
            lines = done.stderr.strip().splitlines()
            clean = done.returncode == 2 and len(lines) == 1 and not (place / "out").exists()
            yield Bar(f"bad input: {name}", f"exit {done.returncode}: {lines[-1] if lines else ''}"[:160],
                      "exit 2, one line, nothing written", clean)  # fmt: skip


def demo() -> Iterator[Bar]:
    """Run the demo and look for what it promises."""
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        command = [sys.executable, "-m", "fastdiff.benchmarks.demo", "--out", scratch]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        files = {file.name for file in Path(scratch).iterdir()}
    complete = {"samples.png", "plot.png", "table.md"} <= files and "| flow map | 4 |" in done.stdout
    yield Bar("demo: picture, plot and table", sorted(files), "all three", complete and done.returncode == 0)
    yield at_most("demo: seconds after the install", seconds, 180)


def bars(quick: bool, data: Path | None) -> Iterator[Bar]:
    """Every bar, cheapest first."""
    yield from oracles()
    yield suite("DDIM and DPM++2M trajectories equal diffusers'", "tests/test_parity_diffusers.py")
    yield suite("the loop runs on the meta device", "tests/test_loop.py", "-k", "meta")
    yield from bad_input()
    yield from latency(5 if quick else 21)
    yield from demo()
    start = time.perf_counter()
    yield suite("tests", *(("-m", "fast") if quick else ()))
    yield at_most("tests: seconds", time.perf_counter() - start, 720)
    yield from quality(1000 if quick else 5000, data)


def main() -> int:
    """Print every bar as it is measured."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.benchmarks.check_main", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds, the fast subset of the tests")
    parser.add_argument("--data", type=Path, help="mnist.npz: also check that samples are not copies")
    options = parser.parse_args()
    return show(bars(options.quick, options.data))


if __name__ == "__main__":
    sys.exit(main())
