"""The kernel table: time and error of every op by implementation, and its share of the memory's copy rate.

Times are those of a replayed CUDA graph of several calls, for every contender alike: without one a small call measures
how fast Python issues work. No time stands without the error of the same call to float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastdiff.benchmarks.environment import copy_rate, l2_bytes, median, repeated_ms, summary
from fastdiff.benchmarks.gpu.cases import Case, call, cases, error, truth
from fastdiff.benchmarks.gpu.common import DTYPES, OPS, Report, capture
from fastdiff.kernels import REFERENCE, Ops

MOST_CALLS = 64  # in one graph


def compiled_ops() -> Ops:
    """The plain ops through ``torch.compile``, the fair opponent of a hand-written kernel."""
    torch.compiler.reset()  # else the count of recompilations runs out after a few shapes
    return Ops(*(torch.compile(op, dynamic=False) for op in REFERENCE))


def measure_kernel(case: Case, dtype: torch.dtype, ops: Ops, device: torch.device, rate: float) -> dict[str, Any]:
    """Time one op in a graph of several calls, each on inputs of its own, together beyond the L2 cache if they can be.

    Args:
        case: op and shape.
        dtype: of the inputs.
        ops: the implementation.
        device: where.
        rate: bytes per second of a plain copy.
    """
    size = case.bytes(dtype)
    calls = min(MOST_CALLS, max(8, math.ceil(2 * l2_bytes(device) / size)))
    inputs = [case.build(dtype, device, seed) for seed in range(calls)]
    exact = truth(case, inputs[0])
    found, plain = (error(call(by, case, inputs[0]), exact) for by in (ops, REFERENCE))

    def run() -> None:
        for arguments in inputs:
            call(ops, case, arguments)

    taken = [value / calls for value in repeated_ms(capture(run, device), device, rounds=30, limit_s=0.5)]
    alone = repeated_ms(lambda: call(ops, case, inputs[0]), device, rounds=30, limit_s=0.3)
    seconds = median(taken) / 1000.0
    return summary(taken) | {
        "launched_alone_ms": median(alone),
        "error": found,
        "error_of_plain_torch": plain,
        "bytes": size,
        "share_of_copy_rate": size / seconds / rate,
        "tflop_per_s": case.flop / seconds / 1e12,
        "beyond_l2": calls * size > 2 * l2_bytes(device),
    }


def part(report: Report, device: torch.device) -> None:
    """Every op, shape and dtype: Triton, plain torch and ``torch.compile``, captured alike."""
    rate = copy_rate(device)
    report.value["copy_gb_per_s"] = rate / 1e9
    for dtype in DTYPES:
        for case in cases():
            if dtype not in case.dtypes:
                continue
            for name, make in {**OPS, "torch.compile": compiled_ops}.items():
                label = {"op": case.op, "shape": case.shape, "dtype": str(dtype), "by": name}
                report.add(label, lambda c=case, d=dtype, m=make: measure_kernel(c, d, m(), device, rate))
