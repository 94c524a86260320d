"""Graphs to files that belong together: written apart, checked, measured, and published with a manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch

from fastdiff.artifact import Manifest, save_manifest
from fastdiff.errors import ArtifactError
from fastdiff.export.graph import Graph
from fastdiff.export.parity import Exported, Inputs, Original, compare, table
from fastdiff.export.ranges import Ranges
from fastdiff.export.ranges import report as range_report
from fastdiff.export.write import check, write_graph
from fastdiff.models.files import sha256, write_text


class Options(NamedTuple):
    """How to export.

    Args:
        dtype: in which the graph computes: float32, float16 or bfloat16. Images and conditioning go in and out as
            float32 all the same.
        target: a name of ``TARGETS``: which operators are kept whole, and which opset is used.
        opset: another one.
        external_data: weights in a file of their own; None: if they are large.
        per_layer: report the error of every layer too.
        parity: measure the error at all. bfloat16 is never measured: onnxruntime's CPU provider does not compute in it.
        size: height and width of what a UNet looks at, where the graph is for these alone; onnxruntime then needs fewer
            products where the image doubles. None: any.
    """

    dtype: torch.dtype = torch.float32
    target: str = "onnxruntime"
    opset: int | None = None
    external_data: bool | None = None
    per_layer: bool = False
    parity: bool = True
    size: tuple[int, int] | None = None


USUAL = Options()


class Part(NamedTuple):
    """One graph of an artifact and the name of its file."""

    name: str
    graph: Graph


def measured(options: Options) -> bool:
    """Is the error of these graphs measured?"""
    return options.parity and options.dtype != torch.bfloat16


def finish(
    file: Path,
    parts: Sequence[Part],
    kind: str,
    identity: str,
    options: Options,
    original: Original,
    cases: Mapping[str, Inputs],
    facts: Mapping[str, Any] | None = None,
    found: Ranges | None = None,
) -> Manifest:
    """Write, check and measure graphs, and let them and their manifest appear."""
    with _apart(file) as folder:
        written: list[Path] = []
        for part in parts:
            written += write_graph(part.graph, folder / part.name, file.with_name(part.name), options.external_data)
        protos = {part.name: check(folder / part.name) for part in parts}
        report: dict[str, Any] = {}
        if cases:
            layers = {
                layer: (i, value) for i, part in enumerate(parts) for layer, value in part.graph.layer_values().items()
            }
            exported = Exported([folder / part.name for part in parts], layers)
            report = compare(original, exported, cases, options.dtype, options.per_layer)
        last = protos[file.name].graph
        manifest = Manifest(
            kind=kind,
            sha256=sha256(folder / file.name),
            model_sha256=identity,
            inputs=signature(last.input),
            outputs=signature(last.output),
            opset=parts[-1].graph.target.opset,
            versions={"fastdiff": version("fastdiff"), "onnx": onnx.__version__},
            sampler=dict(facts or {}),
            parity=report,
            ranges=range_report(found) if found else {},
            dtype=str(options.dtype).removeprefix("torch."),
            target=options.target,
            files={path.name: sha256(path) for path in written if path.name != file.name},
        )
        _publish(file, written, manifest)
    return manifest


@contextmanager
def _apart(file: Path) -> Iterator[Path]:
    """A folder for what is not complete yet, gone in the end."""
    if file.is_dir():
        raise ArtifactError(f"{file}: is a folder; give the name of a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = file.with_name(f".{file.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(file: Path, written: Sequence[Path], manifest: Manifest) -> None:
    """Move the files to where they belong, the manifest last: without it no backend takes the others."""
    moved: list[Path] = []
    try:
        for path in written:
            moved.append(path.replace(file.with_name(path.name)))
        if manifest.parity:
            for ending, text in ((".parity.json", json.dumps(manifest.parity, indent=2) + "\n"),
                                 (".parity.txt", table(manifest.parity))):  # fmt: skip
                moved.append(file.with_name(file.name + ending))
                write_text(moved[-1], text)
        save_manifest(file, manifest)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def signature(entries: Any) -> dict[str, Any]:
    """Inputs or outputs of a graph: name -> [type, shape], where a size that is free has a name."""
    result = {}
    for entry in entries:
        kind = entry.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
        dtype = "bfloat16" if kind.elem_type == onnx.TensorProto.BFLOAT16 else None
        result[entry.name] = [dtype or onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape]
    return result
