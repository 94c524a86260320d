"""What the commands share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdiff.backends import BACKENDS
from fastdiff.errors import PlanError

if TYPE_CHECKING:  # they need the extra ray
    from fastdiff.serve.ray import Scale, Source

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def show(options: argparse.Namespace, report: dict[str, Any], text: str) -> None:
    """Print a report, as JSON if that was asked for."""
    print(json.dumps(report) if options.json else text, flush=True)


def add_running_options(command: argparse.ArgumentParser) -> None:
    """How a model runs."""
    add = command.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=sorted(DTYPES))
    add("--backend", default="auto", choices=sorted(BACKENDS))
    add("--artifact", type=Path, help="exported file, for backends that run one")


def add_ray_options(command: argparse.ArgumentParser, workers: str) -> None:
    """How many replicas or workers there are on Ray, and what each takes."""
    add = command.add_argument
    add(f"--{workers}", type=int, nargs="+", dest="workers", metavar="N",
        help=f"{workers} on Ray: a number, or the least and the most (default: 1 to all that fit)")  # fmt: skip
    add(f"--cpus-per-{workers.removesuffix('s')}", type=int, dest="cores", metavar="N",
        help="cores, and threads, of each (default: 4 or all there are; 1 beside a GPU)")  # fmt: skip


def scale_of(options: argparse.Namespace) -> Scale:
    """What ``add_ray_options`` was given; on a GPU each takes one.

    Raises:
        PlanError: if it is not one number or two.
    """
    from fastdiff.serve.ray import Scale
    from fastdiff.serve.ray.cluster import check

    numbers = options.workers or [1, None]
    if len(numbers) > 2:
        raise PlanError(f"{' '.join(map(str, numbers))}: allowed is a number, or the least and the most")
    scale = Scale(numbers[0], numbers[-1], options.cores, gpus=int(options.device == "cuda"))
    check(scale)
    return scale


def source_of(options: argparse.Namespace) -> Source:
    """The model, and how it runs."""
    from fastdiff.serve.ray import Source

    return Source(
        options.model, options.device, DTYPES[options.dtype], options.backend, options.artifact,
        tuple(getattr(options, "size", None) or ()), getattr(options, "preview_decoder", None),
    )  # fmt: skip
