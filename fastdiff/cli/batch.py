"""``fastdiff batch``: a table of labels or prompts to a folder of pictures, on one machine or many."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from tqdm import tqdm

from fastdiff.cli.common import add_ray_options, add_running_options, scale_of, show, source_of
from fastdiff.errors import BackendError, PlanError

EXAMPLE = """\
Try it:
  printf 'class_label,seed\\n3,1\\n1,2\\n4,3\\n' > table.csv
  fastdiff batch table.csv --out out

Columns, all optional: class_label or prompt, negative_prompt, seed, num_inference_steps, guidance_scale, sampler, and
name, that of the file (default: the row's number). A row whose file is there, and whole, is skipped: run the same again
after whatever went wrong. docs/SERVING.md says more."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = command.add_argument
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    add("table", type=Path, help=".csv, .jsonl or .parquet, a row for each image")
    add("--out", type=Path, default=Path("out"), help="folder for the PNG files, seen by all machines (default: out)")
    add("--seed", type=int, default=0, help="of rows without one: row i gets seed + i (default: 0)")
    add("--num-inference-steps", "--steps", type=int, dest="num_inference_steps", metavar="N",
        help="of rows without a number (default: the model's own)")  # fmt: skip
    add("--sampler", help="of rows without one (default: the model's own)")
    add("--guidance-scale", type=float, help="of rows without one (default: the model's own)")
    add("--max-batch", type=int, default=8, metavar="N",
        help="places in one evaluation of the network; a guided image takes two (default: 8)")  # fmt: skip
    add("--ray", default="local", metavar="ADDRESS",
        help="run on the Ray cluster there, auto: the one of this machine (default: one of its own)")  # fmt: skip
    add_ray_options(command, "workers")
    add_running_options(command)


def batch(options: argparse.Namespace) -> int:
    """``fastdiff batch``."""
    try:
        from fastdiff.serve.ray import cluster, draw, read_table
    except ImportError as error:
        raise BackendError(f"batch needs {error.name}: pip install 'fastdiff[ray]'") from error
    if options.max_batch < 2:
        raise PlanError(f"--max-batch is {options.max_batch}; allowed: 2 or more")
    source, scale = source_of(options).located(), scale_of(options)
    names = ("num_inference_steps", "sampler", "guidance_scale")
    usual = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    with redirect_stdout(sys.stderr), cluster(options.ray):  # Ray prints lines of its own between those programs read
        rows = read_table(options.table, options.seed, usual)
        with tqdm(total=len(rows), unit="image", disable=options.json or not sys.stderr.isatty()) as bar:
            found = draw(source, rows, options.out, scale, options.max_batch, bar.update)
    text = f"{found.drawn} images drawn, {found.kept} were there, {len(found.failed)} failed; in {options.out}"
    text += "".join(f"\n{name}: {why}" for name, why in found.failed.items())
    show(options, {"out": str(options.out), **found._asdict()}, text)
    return 1 if found.failed else 0
