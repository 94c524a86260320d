"""The whole loop by solver and number of steps, its error beside it; and what the loop itself costs the host.

Run ``make bench``, or this file alone:
``python -m pytest benchmarks/bench_samplers.py -o python_files='bench_*.py' --benchmark-only``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from fastdiff.benchmarks.calls import MODEL, make_loop
from fastdiff.benchmarks.environment import environment, median, relative_error, rms_error, synchronize, timed_ms
from fastdiff.benchmarks.host_cost import Identity, bare
from fastdiff.kernels import REFERENCE, Ops, triton_ops
from fastdiff.pipeline import Pipeline

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

LOOPS = [("ddim", 50), ("ddim", 20), ("dpmpp_2m", 20), ("dpmpp_2m", 10), ("unipc", 10), ("heun", 10), ("ddpm", 50)]
LOOPS += [("flow_map", 4), ("flow_map", 2), ("flow_map", 1)]
STOCHASTIC = ("ddpm", "dpmpp_sde")  # more steps draw more noise: from one seed they converge to nothing
CONVERGED = ("heun", 192)
JUDGED = 4  # images whose error is measured; image i has seed i in any batch


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """The bundled model in float32, on the GPU if there is one."""
    return Pipeline.from_pretrained(MODEL, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def ops(pipe: Pipeline) -> Ops:
    """What the loop uses in production on this device."""
    return triton_ops() if pipe.device.type == "cuda" else REFERENCE


@pytest.fixture(scope="module")
def converged(pipe: Pipeline) -> tuple[Tensor, float]:
    """The solution of the network's own equation, and how far half as many steps are from it."""
    solver, steps = CONVERGED
    fine, coarse = (make_loop(pipe, solver, n, JUDGED)() for n in (steps, steps // 2))
    return fine, rms_error(coarse, fine)


@pytest.mark.benchmark(group="loop")
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("solver, steps", LOOPS)
def test_loop(
    benchmark: BenchmarkFixture,
    pipe: Pipeline,
    ops: Ops,
    converged: tuple[Tensor, float],
    solver: str,
    steps: int,
    batch: int,
) -> None:
    """Time a whole loop. The error of ``flow_map`` is that of its training too: its jumps were learned."""
    loop = make_loop(pipe, solver, steps, batch, ops)
    result = loop()[:JUDGED]
    exact = converged[0][: len(result)]
    judged = solver not in STOCHASTIC
    benchmark.pedantic(lambda: timed_ms(loop, pipe.device), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        environment(pipe.device),
        rows=len(loop.table.structure.rows),
        error=rms_error(result, exact) if judged else None,
        largest_error=relative_error(result, exact) if judged else None,
        converged=f"{CONVERGED[0]}, {CONVERGED[1]} steps",
        error_of_converged=converged[1],
    )


@pytest.mark.benchmark(group="host cost of the loop")
@pytest.mark.parametrize(
    "solver, steps", [("ddim", 50), ("dpmpp_2m", 20), ("unipc", 10), ("heun", 10), ("flow_map", 4)]
)
def test_host_cost(benchmark: BenchmarkFixture, pipe: Pipeline, solver: str, steps: int) -> None:
    """Time the loop around a network that does nothing, and the same arithmetic bare, turn by turn."""
    loop = make_loop(pipe, solver, steps, 1, network=Identity())
    plain, rows = bare(loop.table, loop.x, loop.ops), len(loop.table.structure.rows)
    assert torch.equal(loop(), plain())
    synchronize(pipe.device)
    whole, alone = [], []
    for _ in range(100):  # interleaved: whatever slows the machine for a while slows both
        whole.append(timed_ms(loop, pipe.device))
        alone.append(timed_ms(plain, pipe.device))
    benchmark.pedantic(lambda: timed_ms(loop, pipe.device), rounds=50, warmup_rounds=3)
    benchmark.extra_info.update(
        environment(pipe.device),
        rows=rows,
        loop_ms=median(whole),
        bare_ops_ms=median(alone),
        host_us_per_row=1000.0 * (median(whole) - median(alone)) / rows,
        error=0.0,  # equal bits, checked above
    )
