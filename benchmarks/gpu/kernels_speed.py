"""The kernel table: time and error of every op by implementation, and its share of what memory and matrix units give.

Times are those of a replayed CUDA graph of several calls, for every contender alike: without one a small call measures
how fast Python issues work. No time stands without the error of the same call to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmarks.environment import copy_rate, l2_bytes, median, repeated_ms, summary, synchronize
from fastdiff.benchmarks.gpu.cases import Case, call, cases, error, ours, truth
from fastdiff.benchmarks.gpu.common import Report, capture
from fastdiff.kernels import REFERENCE, Ops

MOST_CALLS = 64  # in one graph
MOST_SCORES = 2**33  # bytes that attention without tiles may take
DTYPES = (torch.float16, torch.bfloat16)
OURS, EAGER, COMPILED = "triton", "eager", "torch.compile"
BACKENDS = ("flash", "efficient", "cudnn", "math")


def compiled(case: Case) -> Ops:
    """One plain op through ``torch.compile``, the fair opponent of a hand-written kernel."""
    torch.compiler.reset()  # else the count of recompilations runs out after a few shapes
    return REFERENCE._replace(**{case.op: torch.compile(getattr(REFERENCE, case.op), dynamic=False)})


def backend(name: str) -> Ops:
    """Attention by one of torch's backends."""
    from fastdiff.kernels.dispatch import CANDIDATES

    def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]
        return result

    return REFERENCE._replace(attention=math_attention if name == "math" else CANDIDATES[name])


def contenders(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Ops]]:
    """Who computes a case, by name."""
    found: dict[str, Callable[[], Ops]] = {EAGER: lambda: REFERENCE, OURS: lambda: ours(device)}
    if case.op == "attention":
        queries, keys, width = case.sizes
        scores = case.flop // (4 * width) * 4
        names = [name for name in BACKENDS if name != "math" or scores <= MOST_SCORES]
        found |= {name: lambda name=name: backend(name) for name in names}
    if dtype != torch.bfloat16:  # a compilation for each is most of the time that a part has
        found[COMPILED] = lambda: compiled(case)
    return found


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Measure what the matrix units give a large square product, in flop per second."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / (median(repeated_ms(lambda: a @ b, device, rounds=20, limit_s=1.0)) / 1000.0)


def launches(run: Callable[[], Any], device: torch.device) -> int:
    """Count what one call has the device do: kernels, copies, fills."""
    from torch.profiler import ProfilerActivity, profile

    run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        run()
        synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in record.events())


def measure(
    case: Case, dtype: torch.dtype, ops: Ops, device: torch.device, copy: float, matrix: float
) -> dict[str, Any]:
    """Time one op in a graph of several calls, each on inputs of its own, together beyond the L2 cache if they can be.

    Args:
        case: op and shape.
        dtype: of the inputs.
        ops: the implementation.
        device: where.
        copy: bytes per second of a plain copy.
        matrix: flop per second of a plain product.
    """
    size = case.bytes(dtype)
    calls = min(MOST_CALLS, max(4, math.ceil(2 * l2_bytes(device) / size)))
    inputs = [case.build(dtype, device, seed) for seed in range(calls)]
    exact = truth(case, inputs[0])
    found, plain = (error(call(by, case, inputs[0]), exact) for by in (ops, REFERENCE))
    del exact

    def run() -> None:
        for given in inputs:
            call(ops, case, given)

    taken = [value / calls for value in repeated_ms(capture(run, device), device, rounds=30, limit_s=0.5)]
    alone = repeated_ms(lambda: call(ops, case, inputs[0]), device, rounds=30, limit_s=0.3)
    seconds = median(taken) / 1000.0
    return summary(taken) | {
        "launched_alone_ms": median(alone),
        "launches": launches(lambda: call(ops, case, inputs[0]), device) if device.type == "cuda" else None,
        "error": found,
        "error_of_plain_torch": plain,
        "bytes": size,
        "flop": case.flop,
        "share_of_copy_rate": size / seconds / copy,
        "share_of_matrix_rate": case.flop / seconds / matrix,
        "beyond_l2": calls * size > 2 * l2_bytes(device),
        "sizes": list(case.sizes),
    }


def part(report: Report, device: torch.device) -> None:
    """Every op, shape and dtype, by everyone, captured alike."""
    copy = copy_rate(device)
    matrix = {dtype: matrix_rate(device, dtype) for dtype in DTYPES}
    report.value["copy_gb_per_s"] = copy / 1e9
    report.value["matrix_tflop_per_s"] = {str(dtype): rate / 1e12 for dtype, rate in matrix.items()}
    for dtype in DTYPES:
        for case in [case for case in cases() if case.timed]:
            if case.op == "combine" and dtype != DTYPES[0]:
                continue
            kind = torch.float32 if case.op == "combine" else dtype  # the registers of the loop are float32
            for name, make in contenders(case, kind, device).items():
                label = {"op": case.op, "shape": case.shape, "dtype": str(kind), "by": name}
                report.add(
                    label,
                    lambda c=case, k=kind, m=make, d=dtype: measure(c, k, m(), device, copy, matrix[d]),
                )
