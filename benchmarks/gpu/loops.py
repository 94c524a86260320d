"""Whole loops by backend: steps issued from Python, each step captured, and the whole loop captured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.in_memory import walk_of
from fastdiff.benchmarks.calls import MODEL, Loop, exact_unet, make_loop
from fastdiff.benchmarks.environment import repeated_ms, rms_error, summary
from fastdiff.benchmarks.gpu.common import DTYPES, Report
from fastdiff.kernels import REFERENCE, triton_ops
from fastdiff.models.unet import UNet
from fastdiff.models.weights import load_model
from fastdiff.pipeline import Pipeline, resolve
from fastdiff.sampling.denoiser import CallableNetwork
from fastdiff.sampling.step_cache import planned

BATCHES = (1, 16, 64)
LOOPS = (("flow_map", 4, 1), ("ddim", 20, 1), ("ddim", 20, 3))  # solver, steps, interval of step caching
BACKENDS = ("eager", "captured", "captured_loop")


def pipeline(device: torch.device, dtype: torch.dtype, backend: str) -> Pipeline:
    """The bundled model in a backend."""
    return Pipeline.from_pretrained(MODEL, device=device, dtype=dtype, backend=backend)


def ready(
    pipe: Pipeline, solver: str, steps: int | tuple[float, ...], batch: int, interval: int = 1
) -> tuple[Loop, Callable[[], Tensor]]:
    """A loop, and a call that runs it as its backend does."""
    loop = make_loop(pipe, solver, steps, batch, triton_ops() if pipe.device.type == "cuda" else REFERENCE)
    loop = loop._replace(table=planned(loop.table, pipe.network, interval, 0))
    walk = walk_of(pipe.network)
    return loop, lambda: walk(*loop)


@functools.cache
def exact_network(device: torch.device) -> UNet:
    """The bundled network in float64."""
    return exact_unet(load_model(resolve(MODEL)).network.to(device))


def exact(pipe: Pipeline, solver: str, steps: int | tuple[float, ...], batch: int) -> Tensor:
    """The result of the same loop in float64, network and all; the network is told the same float32 times."""
    unet = exact_network(pipe.device)
    network = CallableNetwork(lambda x, t, s, class_labels: unet(x, t, class_labels, s), two_time=True)
    loop = make_loop(pipe, solver, steps, batch, network=network)
    double = dataclasses.replace(loop.table, values=loop.table.values.double())
    return loop._replace(x=loop.x.double(), table=double)()


def measure(
    device: torch.device, dtype: torch.dtype, backend: str, solver: str, steps: int, batch: int, interval: int
) -> dict[str, Any]:
    """Time and error of a whole loop; the exact one caches nothing."""
    pipe = pipeline(device, dtype, backend)
    _, run = ready(pipe, solver, steps, batch, interval)
    found = rms_error(run(), exact(pipe, solver, steps, batch))
    return summary(repeated_ms(run, device, rounds=50, limit_s=0.7)) | {"error": found}


def part(report: Report, device: torch.device) -> None:
    """Every loop, batch, dtype and backend."""
    for solver, steps, interval in LOOPS:
        for batch in BATCHES:
            for dtype in DTYPES:
                for backend in BACKENDS:
                    label = {"solver": solver, "steps": steps, "batch": batch, "dtype": str(dtype), "backend": backend,
                             "cache_interval": interval}  # fmt: skip
                    report.add(
                        label, functools.partial(measure, device, dtype, backend, solver, steps, batch, interval)
                    )
