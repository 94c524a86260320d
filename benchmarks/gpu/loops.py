"""Whole loops: no host reads, captured equal to uncaptured, also after the table was swapped, and their times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmarks.calls import MODEL, Loop, exact_unet, make_loop
from fastdiff.benchmarks.environment import repeated_ms, rms_error, summary, synchronize
from fastdiff.benchmarks.gpu.common import DTYPES, Report, capture
from fastdiff.benchmarks.gpu.unets import BATCHES, OPS, STEPS, load
from fastdiff.models.unet import UNet
from fastdiff.models.weights import load_model
from fastdiff.pipeline import Pipeline, resolve
from fastdiff.sampling.denoiser import CallableNetwork
from fastdiff.sampling.solvers import SOLVERS

OTHER_TIMES = (1.0, 0.8, 0.45, 0.2)  # as many steps as STEPS, elsewhere: equal structure, other numbers


def without_host_reads(run: Callable[[], Any], device: torch.device) -> None:
    """Run something while torch raises at every operation that makes the host wait for the GPU."""
    run()  # compiling and planning may wait; the loop itself may not
    synchronize(device)
    if device.type != "cuda":
        run()
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def prove_no_host_reads(device: torch.device, solver: str, by: str) -> dict[str, Any]:
    """Run one solver's loop under the watch of ``set_sync_debug_mode``; what it finds is raised."""
    pipe, ops = load(device, torch.float32, by)
    without_host_reads(make_loop(pipe, solver, STEPS, 2, ops), device)
    return {"host_reads": 0}


def prove_watch_works(device: torch.device) -> dict[str, Any]:
    """The proof above is worth something only if the watch raises at a read that is there."""
    try:
        without_host_reads(lambda: torch.ones((), device=device).item(), device)
    except RuntimeError:
        return {"raised": True}
    return {"raised": False}


def exact_loop(pipe: Pipeline, exact: UNet, solver: str, batch: int) -> Tensor:
    """The result of the same loop in float64, network and all; the network is told the same float32 times."""
    network = CallableNetwork(lambda x, t, s, class_labels: exact(x, t, class_labels, s), two_time=True)
    loop = make_loop(pipe, solver, STEPS, batch, network=network)
    with torch.no_grad():
        double = dataclasses.replace(loop.table, values=loop.table.values.double())
        return loop._replace(x=loop.x.double(), table=double)()


def swap(held: Loop, other: Loop) -> None:
    """Copy another loop's numbers over a captured one's: its state, its table and what the network prepared."""
    held.x.copy_(other.x)
    held.table.values.copy_(other.table.values)
    for mine, theirs in zip(held.prepared, other.prepared, strict=True):
        mine.copy_(theirs)


def measure_loop(
    device: torch.device, dtype: torch.dtype, by: str, batch: int, exact: UNet, solver: str = "flow_map"
) -> dict[str, Any]:
    """Time the whole loop captured in one graph and not; prove both equal, also after the table was swapped."""
    pipe, ops = load(device, dtype, by)
    loop = make_loop(pipe, solver, STEPS, batch, ops)
    other = make_loop(pipe, solver, OTHER_TIMES, batch, ops)
    other = other._replace(x=-other.x)  # other noise, and as good
    if other.table.structure != loop.table.structure:
        raise RuntimeError("the second table has another structure; a captured loop cannot take it")
    replay, plain = capture(loop, device), loop().clone()
    uncaptured = repeated_ms(loop, device, rounds=20, limit_s=0.5)
    captured = repeated_ms(replay, device, rounds=50, limit_s=0.5)
    first = replay().clone()
    swap(loop, other)
    second, wanted = replay().clone(), other()
    true = exact_loop(pipe, exact, solver, batch)
    return {
        "uncaptured": summary(uncaptured),
        "captured": summary(captured),
        "equal": torch.equal(first, plain),
        "largest_difference": float((first - plain).abs().max()),
        "equal_after_swap": torch.equal(second, wanted),
        "largest_difference_after_swap": float((second - wanted).abs().max()),
        "swap_mattered": not torch.equal(second, first),
        "error": rms_error(first, true),
    }


def part(report: Report, device: torch.device) -> None:
    """No host reads, for every solver; then the four-step loop captured and not, and one loop that draws noise."""
    report.add({"proof": "the watch raises at a host read"}, lambda: prove_watch_works(device))
    for solver in SOLVERS:
        label = {"proof": "no host reads", "solver": solver, "steps": STEPS, "by": "triton"}
        report.add(label, lambda s=solver: prove_no_host_reads(device, s, "triton"))
    exact = exact_unet(load_model(resolve(MODEL)).network.to(device))
    for batch in BATCHES:
        for dtype in DTYPES:
            for by in OPS:
                label = {"solver": "flow_map", "steps": STEPS, "dtype": str(dtype), "batch": batch, "by": by}
                report.add(label, lambda d=dtype, o=by, b=batch: measure_loop(device, d, o, b, exact))
    label = {"solver": "ddpm", "steps": STEPS, "dtype": str(torch.float32), "batch": 1, "by": "triton"}
    report.add(label, lambda: measure_loop(device, torch.float32, "triton", 1, exact, "ddpm"))
