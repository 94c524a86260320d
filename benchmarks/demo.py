"""``make demo``: the main job on the bundled model, in a minute or two."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from fastdiff.benchmarks.report import write_report
from fastdiff.benchmarks.table import run_table
from fastdiff.pipeline import resolve


def main() -> None:
    """Sample, measure, and show where the picture, the plot and the table are."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.benchmarks.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (default: out)")
    options = parser.parse_args()
    folder = resolve("digits")
    print(f"Bundled digits model on {torch.get_num_threads()} threads: timing and judging every sampler...", flush=True)
    # torch.compile takes minutes for its first images; `fastdiff bench` measures it too
    results = run_table(folder, samples=100, rounds=3, backends=["eager", "native", "onnxruntime"])
    results["missing"]["compile"] = "left out of the demo, since it compiles for minutes: run `fastdiff bench`"
    table = write_report(results, options.out, folder)
    print(table)
    print("\n100 images are few: distances at this count are only comparable with each other.")
    for name, what in (("samples.png", "digits, 1, 2 and 4 steps"), ("plot.png", "latency and quality")):
        print(f"{options.out / name}: {what}")
    if shutil.which("fastdiff"):
        print("Next: fastdiff generate --class-labels 3 1 4 --steps 4, or fastdiff --help")


if __name__ == "__main__":
    main()
