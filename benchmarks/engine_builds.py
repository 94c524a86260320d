"""Engines of the project's networks for GPUs that need not be here: what builds, how fast and how large."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff.backends.trt_library import find_library
from fastdiff.benchmarks.bars import Bar, show
from fastdiff.benchmarks.layouts import SD15, SDXL, scaled
from fastdiff.export.onnx import Options, export_unet, prepare_name
from fastdiff.export.tensorrt import Bucket, Built, Recipe, build_plan
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet
from fastdiff.models.weights import Model, ModelInfo, load_model
from fastdiff.pipeline import resolve

ARCHITECTURES = ("sm86", "sm89", "sm120")
PRECISIONS = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
# What decides the precision and the speed of a UNet; other layers count, compare and reshape.
COMPUTING = ("CONVOLUTION", "MATRIX_MULTIPLY", "NORMALIZATION", "ATTENTION_OUTPUT")
BATCH = (1, 2, 4)


class Case(NamedTuple):
    """A network, and the sizes its engines are to be ready for."""

    model: Model
    bucket: Bucket

    @property
    def split(self) -> bool:
        """Is it exported as two graphs?"""
        return self.model.network.config.conditional


def digits() -> Case:
    """The bundled model."""
    return Case(load_model(resolve("digits")), {"batch": BATCH, "height": (32,) * 3, "width": (32,) * 3})


def layout(config: dict[str, Any], **changes: Any) -> Case:
    """A published layout with an eighth of its widths; its weights are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(UNetConfig.from_dict(scaled(config, 8) | changes)).eval().requires_grad_(False)
    sides = (8, 16, 32)
    return Case(Model(network, ModelInfo()), {"batch": BATCH, "height": sides, "width": sides, "tokens": (77, 77, 154)})


def engines(case: Case, dtype: torch.dtype, folder: Path, architectures: Sequence[str]) -> dict[str, Built]:
    """Export a network for TensorRT for RTX and build an engine of each of its graphs."""
    library, file = find_library("tensorrt_rtx"), folder / "unet.onnx"
    export_unet(case.model, file, options=Options(dtype, "tensorrt-rtx", parity=False))
    buckets = {file.name: case.bucket}
    if case.split:
        names = ("batch", "tokens")
        buckets[prepare_name(file)] = {name: case.bucket[name] for name in names} | {"rows": (1, 20, 50)}
    return {
        name: build_plan(library, folder / name, Recipe((bucket,), tuple(architectures)))
        for name, bucket in buckets.items()
    }


def in_precision(built: Built, dtype: torch.dtype) -> bool:
    """Does every layer that computes do so in this type?"""
    kinds = [name.split() for name in built.layers]
    return all(precision == PRECISIONS[dtype] for kind, precision in kinds if kind in COMPUTING)


def bars(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """Each network in each type, for all GPUs at once."""
    cases = {"digits": digits, "sd15 / 8": lambda: layout(SD15), "sdxl / 8": lambda: layout(SDXL)}
    if quick:
        cases["sdxl / 8"] = lambda: layout(SDXL, layers_per_block=1, transformer_layers_per_block=[1, 1, 2])
    report["builds"] = {}
    for name, make in cases.items():
        case = make()
        for dtype in (torch.float16,) if quick else PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                built = engines(case, dtype, Path(folder), ARCHITECTURES)
                seconds = time.perf_counter() - begin
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            report["builds"][key] = {"seconds": round(seconds, 1), "bytes": {n: len(b.plan) for n, b in built.items()}}
            good = all(in_precision(each, dtype) for each in built.values())
            where = ", ".join(ARCHITECTURES)
            yield Bar(f"{key}: engines for {where}, every layer in its type", len(built), f"== {1 + case.split}", good)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.engine_builds``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="float16 alone, SDXL with fewer layers")
    report: dict[str, Any] = {}
    short = show(bars(parser.parse_args(arguments).quick, report))
    print(report, file=sys.stderr)
    return short


if __name__ == "__main__":
    sys.exit(main())
