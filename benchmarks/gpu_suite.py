"""Everything that needs a GPU, in one command, in parts.

``python -m fastdiff.benchmarks.gpu_suite --out DIR`` from the root of the repository writes one JSON file for each
part under DIR, whole after every entry, and all of them merged in DIR/suite.json. Each part runs in a process of its
own with a limit of its own: a part that hangs is ended, one that breaks the GPU's context takes no other with it, and
what it had measured stays. The same command again goes on where the last one stopped; entries of other code, another
device or other libraries are measured anew.

Without a GPU the parts that Triton's interpreter can run are run there, and the others are not measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff.benchmarks.environment import write_json
from fastdiff.benchmarks.gpu.common import COMMAND, DONE, Report, facts, failed
from fastdiff.models.files import read_json

GRACE_S = 20.0  # for starting a part, and for the entry it was in when its time was up
NOT_MEASURED = "not measured: no NVIDIA GPU"


class Part(NamedTuple):
    """One part: ``module.function(report, device)`` of ``benchmarks/gpu``."""

    module: str
    function: str
    seconds: float
    shows: str
    interpreted: bool = False


PARTS: dict[str, Part] = {
    "kernels_check": Part("kernels_check", "part", 480.0, "every kernel against its twin in float64", True),
    "kernels_speed": Part("kernels_speed", "part", 480.0, "time of every kernel, beside PyTorch's"),
    "proofs": Part("proofs", "part", 300.0, "captured loops: no host reads, equal bits, swaps, threads, memory"),
    "unets": Part("unets", "part", 300.0, "one evaluation of every layout"),
    "memory": Part("memory", "part", 240.0, "the most memory that text to image takes on a small card"),
    "loops": Part("loops", "part", 240.0, "whole loops of the bundled model"),
    "compile": Part("unets", "compile_part", 520.0, "one evaluation of every layout by torch.compile"),
}


def run_part(name: str, file: Path, seconds: float, kind: str) -> None:
    """Run one part to its end; this is what its process does."""
    device, part = torch.device(kind), PARTS[name]
    report = Report(file, seconds, facts(device))
    with torch.no_grad():
        getattr(import_module(f"fastdiff.benchmarks.gpu.{part.module}"), part.function)(report, device)
    report.value["status"] = DONE
    report.value["environment_after"] = facts(device)["environment"]  # the clocks under load
    report.write()


def in_process(name: str, file: Path, seconds: float, kind: str) -> dict[str, Any]:
    """Run one part in a fresh process, end it when its time is up, and return what it wrote."""
    before = file.stat().st_mtime_ns if file.exists() else None
    process = multiprocessing.get_context("spawn").Process(target=run_part, args=(name, file, seconds, kind))
    process.start()
    process.join(seconds + GRACE_S)
    if process.is_alive():
        process.kill()
        process.join()
    if not file.exists() or file.stat().st_mtime_ns == before:  # it broke before its first line
        write_json(file, {"part": name, "command": COMMAND, "status": "", "entries": [], "not_run": []})
    value = read_json(file)
    if value["status"] != DONE:
        value["status"] = f"ended early (exit code {process.exitcode})"
        write_json(file, value)
    return value


def merge(out: Path) -> None:
    """Write all parts that there are into one file."""
    files = {name: out / f"{name}.json" for name in PARTS}
    parts = {name: read_json(file) for name, file in files.items() if file.exists()}
    write_json(out / "suite.json", {"command": COMMAND, "parts": parts})


def healthy(value: dict[str, Any]) -> bool:
    """Did a part come to its end, with every entry measured right? Entries it had no time for are no fault."""
    return value["status"] == DONE and not any(failed(entry) for entry in value["entries"])


def chosen(text: str) -> list[str]:
    """The parts named in ``--only``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}; allowed: {', '.join(PARTS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite. Exit codes: 0 all well, 1 something failed, 2 nothing failed but a part needs a GPU."""
    listed = "; ".join(f"{name}: {part.shows}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="gpu_suite", description="Everything that needs a GPU, in parts.", epilog=listed
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--only", type=chosen, default=list(PARTS), metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, help="limit of each part (default: its own, under nine minutes)")
    options = parser.parse_args(arguments)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)  # would time the interpreter
    else:
        os.environ["TRITON_INTERPRET"] = "1"  # read by the process of each part
    options.out.mkdir(parents=True, exist_ok=True)
    well, complete, began = True, True, time.monotonic()
    for name in options.only:
        if kind == "cpu" and not PARTS[name].interpreted:
            print(f"{name}: {NOT_MEASURED}", flush=True)
            complete = False
            continue
        value = in_process(name, options.out / f"{name}.json", options.seconds or PARTS[name].seconds, kind)
        merge(options.out)
        well = healthy(value) and well
        wrong = sum(failed(entry) for entry in value["entries"])
        print(
            f"{name}: {value['status']}, {len(value['entries'])} entries, {wrong} wrong, "
            f"{len(value['not_run'])} not run, {time.monotonic() - began:.0f} s so far",
            flush=True,
        )
    return 1 if not well else 0 if complete else 2


if __name__ == "__main__":
    sys.exit(main())
