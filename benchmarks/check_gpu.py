"""``make check-gpu``: the bars of GPU speed, one JSON line each; what is not measured without a GPU is not met."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.benchmarks import gpu_suite
from fastdiff.benchmarks.bars import Bar, at_most, not_measured, show, suite
from fastdiff.benchmarks.environment import environment, write_json
from fastdiff.benchmarks.gpu.common import failed
from fastdiff.benchmarks.gpu.kernel_bars import kernel_bars
from fastdiff.benchmarks.gpu.memory import BOUNDS
from fastdiff.benchmarks.gpu.unets import COMPILED
from fastdiff.models.files import read_json

# layout, batch: milliseconds of a step on one H200, share of eager's, share of torch.compile's
STEPS = {
    ("sd15", 2): (3.5, 0.25, 0.67),
    ("sd15", 8): (11.5, 0.50, 0.77),
    ("sdxl", 2): (25.0, 0.45, 0.75),
    ("sdxl", 8): (92.0, 0.55, 0.80),
    ("ddpm-cifar", 1): (0.30, 0.08, 0.67),
}
ERROR = 2.0  # times that of the same network in plain torch at the same precision
QUICK = ("kernels_check", "proofs", "unets", "memory")
AHEAD = ("tests/test_aot.py", "--all-chips")


def judged(name: str, value: float | None, bound: float) -> Bar:
    """A bar that is met from below; one that nothing was measured for is not met."""
    return not_measured(name, f"<= {bound:g}") if value is None else at_most(name, value, bound)


def find(part: Mapping[str, Any], **label: Any) -> dict[str, Any] | None:
    """The sound entry of a label, if there is one."""
    found = [entry for entry in part.get("entries", []) if label.items() <= entry.items() and not failed(entry)]
    return found[0] if found else None


def steps(parts: Mapping[str, Any]) -> Iterator[Bar]:
    """One evaluation of each layout: time, ratios and error."""
    for (layout, batch), (bound, to_eager, to_compiled) in STEPS.items():
        name = f"{layout} batch {batch}"
        ours = find(parts.get("unets", {}), layout=layout, batch=batch, by="fastdiff")
        eager = find(parts.get("unets", {}), layout=layout, batch=batch, by="eager")
        compiled = find(parts.get("compile", {}), layout=layout, batch=batch, by=COMPILED)
        yield judged(f"{name}: ms per step", ours and ours["median_ms"], bound)
        for peer, other, share in (("eager", eager, to_eager), (COMPILED, compiled, to_compiled)):
            ratio = ours["median_ms"] / other["median_ms"] if ours and other else None
            yield judged(f"{name}: time over {peer}'s", ratio, share)
        error = ours["error"] / eager["error"] if ours and eager else None
        yield judged(f"{name}: error over plain torch's", error, ERROR)


def proofs(parts: Mapping[str, Any]) -> Iterator[Bar]:
    """What a captured loop must keep."""
    entries = parts.get("proofs", {}).get("entries", [])
    kinds = ("no host reads", "captured equals uncaptured", "weights swapped in place", "two threads", "memory returns")
    for kind in kinds:
        mine = [entry for entry in entries if entry.get("proof") == kind]
        wrong = sum(failed(entry) for entry in mine) if mine else None
        yield judged(f"proof: {kind}, failures of {len(mine)}", wrong, 0)


def memory(parts: Mapping[str, Any]) -> Iterator[Bar]:
    """What a small card must hold."""
    for model, bound in BOUNDS.items():
        found = find(parts.get("memory", {}), model=model)
        yield judged(
            f"{model}: peak memory of text to image, offloaded and in tiles, GB", found and found["peak_gb"], bound
        )


def bars(folder: Path, quick: bool) -> Iterator[Bar]:
    """Run the suite into a folder, and read its bars there."""
    command = [sys.executable, "-m", "fastdiff.benchmarks.gpu_suite", "--out", str(folder)]
    names = QUICK if quick else tuple(gpu_suite.PARTS)
    subprocess.run([*command, "--only", ",".join(names)], check=False, stdout=sys.stderr)
    merged = folder / "suite.json"
    parts = read_json(merged)["parts"] if merged.exists() else {}
    yield from kernel_bars(parts.get("kernels_check"), parts.get("kernels_speed"))
    chips = AHEAD[:1] if quick else AHEAD
    yield suite("kernels compile for chips that are not here, fit them and spill nothing", *chips)
    yield from steps(parts)
    yield from proofs(parts)
    yield from memory(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.check_gpu``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--suite", type=Path, help="folder of the suite's files; an interrupted run there goes on")
    parser.add_argument("--out", type=Path, help="write the bars to this JSON file")
    options = parser.parse_args(arguments)
    shown: list[Bar] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.suite or Path(scratch)

        def kept() -> Iterator[Bar]:
            for bar in bars(folder, options.quick):
                shown.append(bar)
                yield bar

        short = show(kept())
    if options.out:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        values = [bar._asdict() for bar in shown]
        missing = [bar.bar for bar in shown if bar.value is None]
        write_json(options.out, {"environment": environment(device), "bars": values, "not_measured": missing})
    return short


if __name__ == "__main__":
    sys.exit(main())
