"""Whether a flat plan or the UNet's own forward pass is faster on a GPU; timed once for each shape and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from fastdiff.backends.times import add_times, read_times, table_file
from fastdiff.models.unet import UNet

PLAN, EAGER = "plan", "eager"
MEASURE = "FASTDIFF_MEASURE"  # "0": always the plan, the same on every machine
REPLAYS, ROUNDS = 5, 5  # of one measurement; the best round counts


def fastest(unet: UNet, told: str, ways: Mapping[str, Callable[..., Any]], arguments: Sequence[Any]) -> str:
    """The name of the way that takes the least time on this GPU.

    Args:
        unet: what runs.
        told: what else the time depends on.
        ways: what there is to choose from.
        arguments: to call each with.
    """
    if os.environ.get(MEASURE) == "0":
        return PLAN
    names = [f"{op.__module__}.{op.__qualname__}" for op in unet.ops]
    what = f"{hashlib.sha256(repr((unet.config, names)).encode()).hexdigest()[:16]} {told}"
    gpu = torch.cuda.get_device_name()
    file = table_file(gpu, torch.__version__, torch.version.cuda, metadata.version("fastdiff"))
    times = read_times(file).get(what, {})
    if set(times) != set(ways):
        times = {name: seconds(way, arguments) for name, way in ways.items()}
        times = add_times(file, {what: times})[what]
    return min(ways, key=times.__getitem__)


def seconds(way: Callable[..., Any], arguments: Sequence[Any]) -> float:
    """Seconds of one call on a GPU: the least of a few rounds."""
    way(*arguments)
    best = float("inf")
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            way(*arguments)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000 / REPLAYS)
    return best
