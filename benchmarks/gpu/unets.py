"""One call of the bundled network by dtype, batch and ops, as issued from Python and captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdiff.benchmarks.calls import MODEL, exact_call, exact_unet, make_loop, one_call
from fastdiff.benchmarks.environment import relative_error, repeated_ms, summary
from fastdiff.benchmarks.gpu.common import DTYPES, Report, capture
from fastdiff.kernels import REFERENCE, Ops, triton_ops
from fastdiff.models.unet import UNet
from fastdiff.models.weights import load_model
from fastdiff.pipeline import Pipeline, resolve

BATCHES = (1, 16, 64)
STEPS = 4
OPS: dict[str, Callable[[], Ops]] = {"reference": lambda: REFERENCE, "triton": triton_ops}


def load(device: torch.device, dtype: torch.dtype, by: str) -> tuple[Pipeline, Ops]:
    """Load the bundled model with the ops asked for, in the network and for the loop."""
    if by == "torch.compile":
        torch.compiler.reset()
        return Pipeline.from_pretrained(MODEL, device=device, dtype=dtype, backend="compile"), REFERENCE
    pipe, ops = Pipeline.from_pretrained(MODEL, device=device, dtype=dtype), OPS[by]()
    pipe.network.unet.ops = ops  # type: ignore[attr-defined]
    return pipe, ops


def measure_call(device: torch.device, dtype: torch.dtype, by: str, batch: int, exact: UNet) -> dict[str, Any]:
    """Time one network call of the bundled model, as issued from Python and captured."""
    pipe, _ = load(device, dtype, by)
    loop = make_loop(pipe, "flow_map", STEPS, batch)
    evaluate = one_call(pipe.network, loop, batch)
    labels = torch.arange(batch, device=device) % len(pipe.model.info.classes)
    true = exact_call(exact, loop, labels)
    found = relative_error(evaluate(), true)
    uncaptured = repeated_ms(evaluate, device, rounds=30, limit_s=0.5)
    replay = capture(evaluate, device)
    captured = repeated_ms(replay, device, rounds=50, limit_s=0.5)
    again = relative_error(replay(), true)
    return {"uncaptured": summary(uncaptured), "captured": summary(captured), "error": found, "error_captured": again}


def part(report: Report, device: torch.device) -> None:
    """One call of the bundled network by dtype, batch and ops."""
    add_calls(report, device, [(dtype, batch, by) for dtype in DTYPES for batch in BATCHES for by in OPS])


def compile_part(report: Report, device: torch.device) -> None:
    """The same by ``torch.compile``, in half precision: a part of its own, since compiling may outlast any limit."""
    add_calls(report, device, [(DTYPES[0], batch, "torch.compile") for batch in BATCHES])


def add_calls(report: Report, device: torch.device, rows: Sequence[tuple[torch.dtype, int, str]]) -> None:
    """Measure one network call for each (dtype, batch, ops)."""
    exact = exact_unet(load_model(resolve(MODEL)).network.to(device))
    for dtype, batch, by in rows:
        label = {"dtype": str(dtype), "batch": batch, "by": by}
        report.add(label, lambda d=dtype, b=batch, o=by: measure_call(device, d, o, b, exact))
