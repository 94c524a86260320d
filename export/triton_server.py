"""A model repository for NVIDIA Triton Inference Server: fused samplers, noise and labels in, images out.

The layout and the fields are those of the server's ``model_config.proto``: ``<name>/config.pbtxt`` beside one folder
for each version, which holds ``model.onnx`` (backend onnxruntime) or ``model.plan`` (backend tensorrt).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.artifact import load_manifest as load_graph_manifest
from fastdiff.backends.plan_files import PlanManifest, load_manifest, read_plan
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.models.files import write_text

PLATFORMS = {".onnx": "onnxruntime_onnx", ".plan": "tensorrt_plan"}
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64",
         "FLOAT": "TYPE_FP32", "HALF": "TYPE_FP16", "BF16": "TYPE_BF16", "INT64": "TYPE_INT64"}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


class Serving(NamedTuple):
    """How the server is to run a model.

    Args:
        max_batch_size: most images in one run.
        preferred_batch_size: sizes that are run at once when they are reached; none: as many as wait.
        max_queue_delay_us: how long a request waits for others, in microseconds.
        instances: copies that run side by side, on every GPU or on the CPU.
        kind: ``"KIND_GPU"``, ``"KIND_CPU"`` or ``"KIND_AUTO"``.
    """

    max_batch_size: int = 8
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_us: int = 2000
    instances: int = 1
    kind: str = "KIND_AUTO"


def write_model(repository: Path, name: str, file: Path, serving: Serving, version: int = 1) -> Path:
    """Add a fused sampler to a model repository, or another version of one.

    Args:
        repository: folder of all models.
        name: of the model.
        file: a ``sampler`` export (``.onnx``) or an engine of one (``.plan``), its manifest beside it.
        serving: how to run it.
        version: number of its folder; one that exists is not overwritten.

    Returns:
        The model's folder.

    Raises:
        ArtifactError: if the file is damaged, foreign or no fused sampler, or the version exists.
        PlanError: if name, version or batch sizes cannot be, or the file is an engine that the server does not run.
    """
    _check(name, serving, version)
    facts = _facts(file, serving)
    config = to_text(_config(name, file, serving, facts))
    folder = repository / name
    place = folder / "config.pbtxt"
    if place.exists() and place.read_text(encoding="utf-8") != config:
        raise ArtifactError(f"{place}: describes another model or another way to run it; name another model")
    target = folder / str(version)
    if target.exists():
        raise ArtifactError(f"{target}: exists already; give another version")
    half = folder / f".{version}.part"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        shutil.copy(file, half / f"model{file.suffix}")
        for beside in facts["files"]:  # weights of a large graph, which knows them by name
            shutil.copy(file.with_name(beside), half / beside)
        write_text(half / "fastdiff.json", json.dumps(facts, indent=2) + "\n")
        write_text(place, config)
        half.rename(target)  # last: the server takes a version as soon as its folder is there
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def _check(name: str, serving: Serving, version: int) -> None:
    if not NAME.fullmatch(name):
        raise PlanError(f"model name is {name!r}; allowed: letters, digits, '_', '-' and '.', not first '-' or '.'")
    if version < 1:
        raise PlanError(f"version is {version}; allowed: 1 or more")
    largest = serving.max_batch_size
    if largest < 1 or serving.instances < 1 or serving.max_queue_delay_us < 0:
        raise PlanError(f"{serving}; allowed: batch and instances of 1 or more, a delay of 0 or more")
    if not all(1 <= size <= largest for size in serving.preferred_batch_size):
        raise PlanError(f"preferred_batch_size is {list(serving.preferred_batch_size)}; allowed: 1 to {largest}")
    if serving.kind not in ("KIND_GPU", "KIND_CPU", "KIND_AUTO"):
        raise PlanError(f"kind is {serving.kind!r}; allowed: KIND_GPU, KIND_CPU, KIND_AUTO")


def _facts(file: Path, serving: Serving) -> dict[str, Any]:
    """What the file's own manifest says, checked against the file."""
    if file.suffix not in PLATFORMS:
        raise PlanError(f"{file}: allowed are {' and '.join(PLATFORMS)} files")
    if file.suffix == ".onnx":
        graph = load_graph_manifest(file)
        kind, facts = graph.kind, {"inputs": graph.inputs, "outputs": graph.outputs, "sampler": graph.sampler,
                                    "files": sorted(graph.files)}  # fmt: skip
    else:
        plan = load_manifest(file)
        if plan.library != "tensorrt":
            raise PlanError(f"{file}: is an engine of {plan.library}; the server runs those of tensorrt alone")
        read_plan(file, library=plan.library, version=plan.version)
        _fits(file, plan, serving)
        kind, facts = plan.graph.get("kind"), {"inputs": plan.inputs, "outputs": plan.outputs,
                                               "sampler": plan.graph.get("sampler", {}), "files": []}  # fmt: skip
        facts["versions"] = {plan.library: plan.version, "gpu": ", ".join(plan.architectures)}
    if kind != "sampler":
        raise ArtifactError(f"{file}: holds a {kind}; a fused sampler is needed: fastdiff export --fuse-sampler N")
    return facts


def _fits(file: Path, plan: PlanManifest, serving: Serving) -> None:
    """The largest batch that is announced must lie in a profile."""
    most = max((min(shapes[2][0] for shapes in profile.values()) for profile in plan.profiles), default=0)
    if serving.max_batch_size > most:
        raise PlanError(f"max_batch_size is {serving.max_batch_size}; {file} was built for {most} at most")


def _config(name: str, file: Path, serving: Serving, facts: Mapping[str, Any]) -> dict[str, Any]:
    batching: dict[str, Any] = {"max_queue_delay_microseconds": serving.max_queue_delay_us}
    if serving.preferred_batch_size:
        batching["preferred_batch_size"] = list(serving.preferred_batch_size)
    return {
        "name": name,
        "platform": PLATFORMS[file.suffix],
        "max_batch_size": serving.max_batch_size,
        "input": [_tensor(key, *value) for key, value in facts["inputs"].items()],
        "output": [_tensor(key, *value) for key, value in facts["outputs"].items()],
        "default_model_filename": f"model{file.suffix}",
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [{"count": serving.instances, "kind": Word(serving.kind)}],
        "dynamic_batching": batching,
    }


def _tensor(name: str, dtype: str, shape: Sequence[Any]) -> dict[str, Any]:
    """One input or output, without the batch, which the server adds itself; it knows no tensor that has nothing else.

    A tensor ``[batch]`` is announced as ``[batch, 1]`` and reshaped.
    """
    sizes = [size if isinstance(size, int) else -1 for size in shape[1:]]
    entry = {"name": name, "data_type": Word(TYPES[dtype]), "dims": sizes or [1]}
    return entry if sizes else entry | {"reshape": {"shape": []}}


class Word(str):
    """An enumerator: protobuf's text format writes it without quotes."""


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """Write a message in protobuf's text format."""
    lines = []
    for name, value in message.items():
        many = value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]
        for each in many:
            if isinstance(each, Mapping):
                lines += [f"{indent}{name} {{", to_text(each, indent + "  ") + f"{indent}}}"]
            elif isinstance(each, list):
                lines.append(f"{indent}{name}: [{', '.join(map(str, each))}]")
            elif isinstance(each, Word | int):
                lines.append(f"{indent}{name}: {each}")
            else:
                lines.append(f"{indent}{name}: {json.dumps(str(each))}")
    return "\n".join(lines) + "\n"
