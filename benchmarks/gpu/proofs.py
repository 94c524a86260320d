"""What a captured loop must keep: no host reads, the uncaptured one's bits, its memory; in threads, after swaps."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmarks.environment import synchronize
from fastdiff.benchmarks.gpu.common import DTYPES, Report
from fastdiff.benchmarks.gpu.loops import pipeline, ready
from fastdiff.sampling.solvers import SOLVERS

STEPS, BATCH, THREADS, TURNS = 4, 2, 2, 20
TIMES = ((0.98, 0.7, 0.4, 0.1), (0.95, 0.8, 0.45, 0.2))  # equal structure, other numbers


def without_host_reads(run: Callable[[], Any], device: torch.device) -> None:
    """Run something while torch raises at every operation that makes the host wait for the GPU."""
    run()  # compiling, planning and capturing may wait; the loop itself may not
    synchronize(device)
    if device.type != "cuda":
        run()
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch_works(device: torch.device) -> dict[str, Any]:
    """The watch is worth something only if it raises at a read that is there."""
    try:
        without_host_reads(lambda: torch.ones((), device=device).item(), device)
    except RuntimeError:
        return {"raised": True}
    return {"raised": False}


def no_host_reads(device: torch.device, solver: str, backend: str) -> dict[str, Any]:
    """Run one solver's loop under the watch; what it finds is raised."""
    _, run = ready(pipeline(device, torch.float32, backend), solver, STEPS, BATCH)
    without_host_reads(run, device)
    return {"host_reads": 0}


def same(got: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Are two results equal, bit for bit, and how far apart are they?"""
    return {"equal": torch.equal(got, wanted), "largest_difference": float((got - wanted).abs().max())}


def captured_is_uncaptured(device: torch.device, dtype: torch.dtype, solver: str) -> dict[str, Any]:
    """The loop in one graph against its own calls issued one by one, for two schedules of one structure."""
    pipe = pipeline(device, dtype, "captured_loop")
    results = []
    for times in TIMES:
        loop, run = ready(pipe, solver, times, BATCH)
        plain = loop._replace(denoiser=type(loop.denoiser)(pipe.network.plain()))
        results.append((run(), plain()))
    (first, first_plain), (second, second_plain) = results
    after = same(second, second_plain)
    return same(first, first_plain) | {
        "equal_after_swap": after["equal"],
        "largest_difference_after_swap": after["largest_difference"],
        "swap_mattered": not torch.equal(first, second),
    }


def caching_is_uncaptured(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A captured loop with step caching against its own calls issued one by one; both kinds of rows run."""
    pipe = pipeline(device, dtype, "captured_loop")
    (_, whole), (loop, run) = (ready(pipe, "ddim", STEPS, BATCH, interval) for interval in (1, 2))
    plain, got = loop._replace(denoiser=type(loop.denoiser)(pipe.network.plain())), run()
    return same(got, plain()) | {"ok": not torch.equal(got, whole())}


def swapped_weights(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Weights changed in place, as a LoRA swap does: the graph must follow without a new capture."""
    pipe = pipeline(device, dtype, "captured_loop")
    _, run = ready(pipe, "flow_map", STEPS, BATCH)
    before = run()
    with torch.no_grad():
        for name, parameter in pipe.network.unet.named_parameters():
            if "to_v" in name or "conv1.weight" in name:
                parameter.mul_(1.25)
    loop, run = ready(pipe, "flow_map", STEPS, BATCH)  # prepares again, which is what follows the weights
    graphs = len(pipe.network._captured._graphs)
    got = run()
    plain = loop._replace(denoiser=type(loop.denoiser)(pipe.network.plain()))()
    return same(got, plain) | {
        "swap_mattered": not torch.equal(got, before),
        "ok": len(pipe.network._captured._graphs) == graphs,
    }


def threads(device: torch.device) -> dict[str, Any]:
    """Two threads on streams of their own share one network, each with its own images."""
    pipe = pipeline(device, torch.float16, "captured")
    runs = [ready(pipe, "flow_map", STEPS, BATCH)[0] for _ in range(THREADS)]
    runs = [run._replace(x=(1.0 + 0.5 * i) * run.x) for i, run in enumerate(runs)]
    wanted = [run().clone() for run in runs]
    synchronize(device)
    wrong: list[int] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(TURNS):
                if not torch.equal(runs[i](), wanted[i]):
                    wrong.append(i)

    started = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return {"equal": not wrong, "wrong_turns": len(wrong), "turns": THREADS * TURNS}


def memory_returns(device: torch.device) -> dict[str, Any]:
    """Memory after many runs is what it was after the first, and all of it is given back."""
    if device.type != "cuda":
        return {"equal": True, "bytes_kept": 0}
    gc.collect()
    torch.cuda.empty_cache()
    nothing = torch.cuda.memory_allocated(device)
    pipe = pipeline(device, torch.float16, "captured_loop")
    _, run = ready(pipe, "flow_map", STEPS, BATCH)
    run()
    before = torch.cuda.memory_allocated(device)
    for _ in range(TURNS):
        run()
    after = torch.cuda.memory_allocated(device)
    del pipe, run, _
    gc.collect()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated(device) - nothing
    return {"equal": before == after, "ok": left <= 0, "bytes_of_a_run": after - before, "bytes_kept": left}


def part(report: Report, device: torch.device) -> None:
    """All of it."""
    report.add({"proof": "the watch raises at a host read"}, lambda: watch_works(device))
    for solver in SOLVERS:
        for backend in ("eager", "captured", "captured_loop"):
            label = {"proof": "no host reads", "solver": solver, "steps": STEPS, "backend": backend}
            report.add(label, functools.partial(no_host_reads, device, solver, backend))
    for dtype in DTYPES:
        for solver in ("flow_map", "ddim", "dpmpp_2m", "ddpm"):
            label = {"proof": "captured equals uncaptured", "solver": solver, "dtype": str(dtype)}
            report.add(label, functools.partial(captured_is_uncaptured, device, dtype, solver))
        label = {"proof": "captured equals uncaptured", "solver": "ddim with step caching", "dtype": str(dtype)}
        report.add(label, functools.partial(caching_is_uncaptured, device, dtype))
        label = {"proof": "weights swapped in place", "dtype": str(dtype)}
        report.add(label, functools.partial(swapped_weights, device, dtype))
    report.add({"proof": "two threads"}, lambda: threads(device))
    report.add({"proof": "memory returns"}, lambda: memory_returns(device))
