"""Each op: plain torch against its Triton twin, with its error to float64 and its share of the memory's copy rate.

Run ``make bench``, or this file alone:
``python -m pytest benchmarks/bench_kernels.py -o python_files='bench_*.py' --benchmark-only``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fastdiff.benchmarks.environment import copy_rate, environment, median, synchronize, timed_ms
from fastdiff.benchmarks.gpu.cases import HALF, Case, call, cases, error, ours, truth
from fastdiff.kernels import REFERENCE

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture(scope="module")
def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def rate(device: torch.device) -> float:
    """Bytes per second of a plain copy, measured once, in the same process."""
    return copy_rate(device)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}-{case.shape}")
def test_kernel(
    benchmark: BenchmarkFixture,
    case: Case,
    dtype: torch.dtype,
    implementation: str,
    device: torch.device,
    rate: float,
) -> None:
    """Time one op. On a GPU one launch a round, the host's part included; ``gpu_suite`` times it captured."""
    if implementation == "triton" and device.type == "cpu":
        pytest.skip("needs an NVIDIA GPU: the time of Triton's interpreter means nothing")
    if dtype not in case.dtypes or (dtype != torch.float32 and device.type == "cpu"):
        pytest.skip(f"{case.op} does not run in {dtype} on {device.type}")
    arguments = case.build(dtype, device, 0)
    ops = REFERENCE if implementation == "reference" else ours(device)
    result = call(ops, case, arguments)  # compiles, too
    synchronize(device)
    taken: list[float] = []

    def run() -> None:
        taken.append(timed_ms(lambda: call(ops, case, arguments), device))

    benchmark.group = f"{case.op} {case.shape} {dtype}"
    few = device.type == "cpu" and case.flop > 1e10
    benchmark.pedantic(run, rounds=5 if few else 50, warmup_rounds=1 if few else 3)
    seconds = median(taken[1 if few else 3 :]) / 1000.0
    benchmark.extra_info.update(
        environment(device),
        device_ms=1000.0 * seconds,
        bytes=case.bytes(dtype),
        flop=case.flop,
        share_of_copy_rate=case.bytes(dtype) / seconds / rate,
        copy_gb_per_s=rate / 1e9,
        error=error(result, truth(case, arguments)),
    )
