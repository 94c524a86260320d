"""How the cost of the bundled model grows with the batch and with the size of the image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastdiff.backends.in_memory import network_of
from fastdiff.models.weights import load_model
from fastdiff.pipeline import resolve
from fastdiff.sampling.denoiser import Cond

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (32, 48, 64, 80, 96, 112, 128)


def _evaluations(shapes: list[tuple[int, int]]) -> list[Callable[[], object]]:
    unet = load_model(resolve("digits")).network.to(memory_format=torch.channels_last)
    network = network_of(unet)
    runs = []
    for batch, size in shapes:
        x = torch.randn(batch, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
        prepared = network.prepare(Cond(torch.zeros(batch, dtype=torch.int64)), torch.full((1, 1, 2), 500.0))
        index = torch.zeros(batch, dtype=torch.int64)
        runs.append(lambda x=x, index=index, prepared=prepared: network(x, index, prepared))
    return runs


@torch.no_grad()
def _curve(shapes: list[tuple[int, int]], rounds: int) -> list[float]:
    """Median milliseconds of an evaluation of each shape; the shapes take turns."""
    runs = _evaluations(shapes)
    spent: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for run, times in zip(runs, spent, strict=True):
            run()  # after its own kind, as in a sampling loop
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(times) for times in spent]


def by_batch(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per image at 32 pixels, for each of ``BATCHES``."""
    times = _curve([(batch, 32) for batch in BATCHES], rounds)
    return [{"batch": b, "ms": round(t, 4), "per": round(t / b, 5)} for b, t in zip(BATCHES, times, strict=True)]


def by_size(rounds: int) -> list[dict[str, Any]]:
    """Microseconds per pixel of one image, for each of ``SIZES``."""
    times = _curve([(1, size) for size in SIZES], rounds)
    return [{"size": s, "ms": round(t, 4), "per": round(1e3 * t / s**2, 5)} for s, t in zip(SIZES, times, strict=True)]


def worst_step(curve: list[dict[str, Any]]) -> float:
    """The largest ratio of one point's cost to that of the point before."""
    return max(after["per"] / before["per"] for before, after in zip(curve, curve[1:], strict=False))
