"""Everything that needs a GPU, correctness first, in one command under nine minutes.

``python -m fastdiff.benchmarks.gpu_suite --out DIR`` from the root of the repository writes one JSON file for each
part under DIR, whole after every entry. Each part runs in a process of its own with a limit of its own: a part that
hangs is ended, one that breaks the GPU's context takes no other with it, and what it had measured stays.

Times of kernels and of captured calls are those of a replayed CUDA graph, for every contender alike: without one a
small call measures how fast Python issues work. No time stands without the error of the same call to float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmarks.bench_kernels import Case, call, cases, error, truth
from fastdiff.benchmarks.bench_samplers import MODEL, Loop, make_loop
from fastdiff.benchmarks.bench_unet import exact_call, exact_unet, one_call
from fastdiff.benchmarks.environment import (
    copy_rate,
    environment,
    l2_bytes,
    median,
    relative_error,
    repeated_ms,
    rms_error,
    summary,
    synchronize,
    write_json,
)
from fastdiff.kernels import REFERENCE, Ops, triton_ops
from fastdiff.models.files import read_json
from fastdiff.models.unet import UNet
from fastdiff.models.weights import load_model
from fastdiff.pipeline import Pipeline, resolve
from fastdiff.sampling.denoiser import CallableNetwork
from fastdiff.sampling.solvers import SOLVERS

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m fastdiff.benchmarks.gpu_suite --out DIR"
SECONDS = {"tests": 170.0, "kernels": 110.0, "unet": 60.0, "loop": 60.0, "compile": 70.0}
GRACE_S = 12.0  # for starting a part, and for the entry it was in when its time was up
LIMIT_S = 540.0
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BATCHES = (1, 16, 64)
OPS: dict[str, Callable[[], Ops]] = {"reference": lambda: REFERENCE, "triton": triton_ops}
STEPS = 4
OTHER_TIMES = (1.0, 0.8, 0.45, 0.2)  # as many steps as STEPS, elsewhere: equal structure, other numbers
MOST_CALLS = 64  # in one graph
# Compiles for chips that are not there; it needs no GPU and many seconds, and runs wherever the tests run.
LEFT_OUT = "compile_for_chips"
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


class Report:
    """One part's file: written whole after every entry, so that a killed part leaves what it had.

    Args:
        file: where to write.
        seconds: after which no further entry is begun.
        facts: what holds for every entry.
    """

    def __init__(self, file: Path, seconds: float, facts: dict[str, Any]):
        self.file, self.until = file, time.monotonic() + seconds
        self.value: dict[str, Any] = {"part": file.stem, "command": COMMAND, "status": "running", **facts}
        self.value |= {"entries": [], "not_run": []}
        self.write()

    def write(self) -> None:
        """Write the file as it stands."""
        write_json(self.file, self.value)

    def add(self, label: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one entry, or say that it failed or that the time was up. A failure does not end the part."""
        if time.monotonic() >= self.until:
            self.value["not_run"].append(label)
        else:
            try:
                self.value["entries"].append(label | measure())
            except Exception as reason:  # of whatever kind: the other entries are worth having
                self.value["entries"].append(label | {"failed": f"{type(reason).__name__}: {str(reason)[:300]}"})
        self.write()


def capture(fn: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Warm ``fn`` up, capture it in a CUDA graph and return the replay; on a CPU return ``fn``.

    The replay returns what ``fn`` returned, in the same memory every time.
    """
    if device.type != "cuda":
        return fn
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, plans and allocates: none of these may happen while capturing
            fn()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


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


def kernels_part(report: Report, device: torch.device) -> None:
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


def unet_part(report: Report, device: torch.device) -> None:
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


def loop_part(report: Report, device: torch.device) -> None:
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


PARTS: dict[str, Callable[[Report, torch.device], None]] = {
    "kernels": kernels_part,
    "unet": unet_part,
    "loop": loop_part,
    "compile": compile_part,
}


def outcomes(log: str) -> dict[str, Any]:
    """Count the outcomes in the output of ``pytest -v``, also one that was cut short, and name what failed."""
    lines = [(line, OUTCOME.search(line)) for line in log.splitlines() if "::" in line]
    found = [(line, match.group(1)) for line, match in lines if match]
    counts = Counter(outcome.lower() for _, outcome in found)
    bad = [line.strip()[:200] for line, outcome in found if outcome in ("FAILED", "ERROR")]
    return {"passed": 0, "failed": 0, "error": 0, "skipped": 0, **counts, "not_passed": bad[:20]}


def run_tests(out: Path, seconds: float) -> dict[str, Any]:
    """Run the kernel tests, which take the GPU where there is one, in a process; the log is read even if it is killed.

    The project's own pytest options are left out: they name plugins that this run does not need.
    """
    command = [sys.executable, "-m", "pytest", "tests/test_kernels.py", "-v", "-rN", "-o", "addopts=", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-k", f"not {LEFT_OUT}"]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", "4"]  # nearly all of the time is Triton compiling on the host
    log, timed_out, code = out / "tests.log", False, None
    settings = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, env=settings, check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            timed_out = True
    counts = outcomes(log.read_text(encoding="utf-8", errors="replace"))
    return {**counts, "timed_out": timed_out, "pytest_exit": code, "left_out": LEFT_OUT}


def run_part(name: str, file: Path, seconds: float) -> None:
    """Run one part to its end; this is what its process does."""
    device = torch.device("cuda")
    report = Report(file, seconds, {"environment": environment(device)})
    with torch.no_grad():
        PARTS[name](report, device)
    report.value["status"] = "done"
    report.value["environment_after"] = environment(device)  # the clocks under load
    report.write()


def in_process(name: str, file: Path, seconds: float) -> dict[str, Any]:
    """Run one part in a fresh process, end it when its time is up, and return what it wrote."""
    file.unlink(missing_ok=True)  # an older run's figures must not pass for this one's
    process = multiprocessing.get_context("spawn").Process(target=run_part, args=(name, file, seconds))
    process.start()
    process.join(seconds + GRACE_S)
    if process.is_alive():
        process.kill()
        process.join()
    value = read_json(file) if file.exists() else {"part": name, "entries": [], "not_run": []}
    if value.get("status") != "done":
        value["status"] = f"ended early (exit code {process.exitcode})"
        write_json(file, value)
    return value


def healthy(value: dict[str, Any]) -> bool:
    """Did a part come to its end, with every entry measured right? Entries it had no time for are no fault."""
    wrong = any(
        "failed" in entry
        or not entry.get("equal", True)
        or not entry.get("equal_after_swap", True)
        or not entry.get("raised", True)
        for entry in value["entries"]
    )
    return value["status"] == "done" and not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite. Exit codes: 0 all well, 1 something failed, 2 no GPU here."""
    parser = argparse.ArgumentParser(prog="gpu_suite", description="Everything that needs a GPU, in one command.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument(
        "--tests", action=argparse.BooleanOptionalAction, default=True, help="run the kernel tests first (default)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no NVIDIA GPU here; nothing was run", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # would time the interpreter
    options.out.mkdir(parents=True, exist_ok=True)
    well, began = True, time.monotonic()
    if options.tests:
        counts = run_tests(options.out, SECONDS["tests"])
        write_json(options.out / "tests.json", {"part": "tests", "environment": environment(), **counts})
        well = counts["pytest_exit"] == 0 and counts["passed"] > 0
        print(f"tests: {json.dumps(counts)}", flush=True)
    for name in PARTS:
        left = LIMIT_S - GRACE_S - (time.monotonic() - began)
        value = in_process(name, options.out / f"{name}.json", max(1.0, min(SECONDS[name], left)))
        well = healthy(value) and well
        failed = sum("failed" in entry for entry in value["entries"])
        print(
            f"{name}: {value['status']}, {len(value['entries'])} entries, {failed} failed, "
            f"{len(value['not_run'])} not run, {time.monotonic() - began:.0f} s so far",
            flush=True,
        )
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
