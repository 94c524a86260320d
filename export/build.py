"""``fastdiff build``: a folder that draws images without the model's code or weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import onnx
import torch

from fastdiff.artifact import load_manifest
from fastdiff.backends.plan_files import manifest_of
from fastdiff.built.folder import BUILT, FORMAT, FUSED, STEPS, TABLES, Preset
from fastdiff.built.tables import to_json
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.export.onnx import Options, export_sampler, export_unet, table_of
from fastdiff.export.plan_cache import PlanCache
from fastdiff.export.tensorrt import Bucket, Recipe
from fastdiff.models.files import sha256, write_tensors, write_text
from fastdiff.models.weights import Model, fingerprint
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.prediction import PREDICTIONS
from fastdiff.sampling.table import StepTable

UNET = "unet.onnx"
STEPS_OF = {"flow_map": 4}
DEFAULT_STEPS = 20


class Wanted(NamedTuple):
    """A preset to build. None: the model's own."""

    num_inference_steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    fused: bool = False


class Engines(NamedTuple):
    """Which engines to build beside the graphs, from graphs of their own that keep whole what TensorRT has kernels for.

    Args:
        cache: keeps them between builds; its library builds.
        architectures: ``"sm86"``...; for TensorRT none, as it builds for the GPU that is here.
        batch: smallest, usual and largest number of images.
        refit: let weights be changed in the finished engine.
        bars: show progress.
        cancelled: asked after every step.
    """

    cache: PlanCache
    architectures: tuple[str, ...]
    batch: tuple[int, int, int] = (1, 1, 8)
    refit: bool = False
    bars: bool = False
    cancelled: Callable[[], bool] | None = None


def build_folder(
    model: Model,
    out: str | os.PathLike[str],
    wanted: Sequence[Wanted],
    engines: Engines | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Build a deployable folder; it appears whole or not at all.

    Args:
        model: loaded from a folder, float32, with classes or without.
        out: must not exist yet.
        wanted: presets; the first is the default.
        engines: also build engines.
        dtype: in which graphs and engines compute.

    Returns:
        The SHA-256 of its description, ``built.json``: who names it to ``load_built`` trusts the engines.

    Raises:
        PlanError: on presets that cannot be.
        ArtifactError: if ``out`` exists, or an export or a build fails.
    """
    if model.folder is None:
        raise ArtifactError("build needs a model that was loaded from a folder, so that its hash can be recorded")
    if model.network.config.conditional or model.network.config.sample_size is None:
        raise PlanError(
            "a folder is built of a network whose config has a sample_size; one that reads text needs all its pipeline"
        )
    presets, tables = planned(wanted, partial(_preset, model))
    with appearing(Path(out)) as root:
        for preset in presets.values():
            if not (root / preset.graph).exists():  # presets may share one
                _export(model, root / preset.graph, preset, Options(dtype))
        write_tables(root, tables)
        if engines is not None:
            _build_engines(model, root, presets, engines, dtype)
        return describe(root, presets, _facts(model))


def planned(
    wanted: Sequence[Wanted], plan: Callable[[Wanted], tuple[str, Preset, StepTable | None]]
) -> tuple[dict[str, Preset], dict[str, StepTable]]:
    """Plan all presets of a folder: what is written of each, and the tables of those that have one, by name.

    Raises:
        PlanError: if there is none, or one twice, or one cannot be.
    """
    if not wanted:
        raise PlanError("a folder needs one preset or more")
    presets: dict[str, Preset] = {}
    tables: dict[str, StepTable] = {}
    for one in wanted:
        name, preset, table = plan(one)
        if name in presets:
            raise PlanError(f"preset {name!r} is asked for twice")
        presets[name] = preset
        if table is not None:
            tables[name] = table
    return presets, tables


def _preset(model: Model, wanted: Wanted) -> tuple[str, Preset, StepTable | None]:
    """Plan one way to draw."""
    path, prediction = PATHS[model.info.path](), PREDICTIONS[model.info.prediction]
    sampler = wanted.sampler or ("flow_map" if prediction.two_time else "dpmpp_2m")
    steps = wanted.num_inference_steps or STEPS_OF.get(sampler, DEFAULT_STEPS)
    strength = model.info.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale
    if strength != 1 and model.info.null_label is None:
        raise PlanError(f"guidance_scale is {strength:g}; this model has no null label, so 1 alone is allowed")
    table, scale = table_of(model, (path, prediction), sampler, steps, strength)
    name = preset_name(sampler, steps) + ("-fused" if wanted.fused else "")
    preset = Preset(
        kind=FUSED if wanted.fused else STEPS,
        graph=f"{name}.onnx" if wanted.fused else UNET,
        sampler=sampler,
        num_inference_steps=steps,
        guidance_scale=float(strength),
        scale=scale,
        table=None if wanted.fused else to_json(table.structure),
        plans={},
    )
    return name, preset, None if wanted.fused else table


def preset_name(sampler: str, steps: int) -> str:
    """What a preset is called."""
    return f"{sampler.replace(':', '-').replace(',', '-').replace('=', '')}-{steps}"


def write_tables(root: Path, tables: Mapping[str, StepTable]) -> None:
    """Write the numbers of the tables of all presets, if there are any."""
    if tables:
        write_tensors(root / TABLES, {name: table.values for name, table in tables.items()}, {"format": "pt"})


def _export(model: Model, file: Path, preset: Preset, options: Options) -> None:
    """Export what a preset runs."""
    if preset.kind == FUSED:
        export_sampler(model, file, preset.num_inference_steps, preset.sampler, preset.guidance_scale, options=options)
    else:
        export_unet(model, file, options=options)


def _build_engines(model: Model, root: Path, presets: dict[str, Preset], engines: Engines, dtype: torch.dtype) -> None:
    """Build an engine of every graph for every architecture, and note them in the presets."""
    cache, target = engines.cache, "tensorrt-rtx" if engines.cache.library.rtx else "tensorrt"
    for name in sorted({preset.graph for preset in presets.values()}):
        sharing = [preset for preset in presets.values() if preset.graph == name]
        with TemporaryDirectory() as scratch:
            graph = Path(scratch) / name
            _export(model, graph, sharing[0], Options(dtype, target))
            # a guided row asks the network for both estimates at once
            times = 2 if model.info.null_label is not None and sharing[0].kind == STEPS else 1
            batch = engines.batch[0], engines.batch[1] * times, engines.batch[2] * times
            bucket = bucket_of(graph, batch, model.network.config.sample_size or 0)
            for group in [(each,) for each in engines.architectures] or [()]:
                recipe = Recipe((bucket,), group, engines.refit)
                plan = cache.get(graph, recipe, bars=engines.bars, cancelled=engines.cancelled)
                for here in cache.read(plan)[1].architectures:
                    _place(plan, root / here / f"{graph.stem}.plan")
                    for preset in sharing:
                        preset.plans[here] = f"{here}/{graph.stem}.plan"


def build_graph(graph: Path, out: Path, buckets: Sequence[Bucket], engines: Engines) -> list[Path]:
    """Build engines of a graph that ``fastdiff export`` wrote, and of the one beside it that runs once, if it has one.

    Args:
        graph: ONNX file.
        out: gets ``<arch>/<graph>.plan``, each with its manifest.
        buckets: sizes for every dimension that one of the graphs leaves free.
        engines: how; their ``batch`` is not read.

    Returns:
        The plans.

    Raises:
        ArtifactError: if the graph is damaged, or a build fails.
        PlanError: if a bucket names a dimension that no graph has, or lacks one.
    """
    manifest = load_manifest(graph)
    graphs = [graph, *(graph.with_name(name) for name in sorted(manifest.files) if name.endswith(".onnx"))]
    free = {place: free_dimensions(place) for place in graphs}
    known = set().union(*free.values())
    for bucket in buckets:
        for strange in sorted(set(bucket) - known):
            raise PlanError(f"a bucket bounds dimension {strange!r}; the graph's: {', '.join(sorted(known)) or 'none'}")
    made = []
    for place, names in free.items():
        fitting = [{name: sizes for name, sizes in bucket.items() if name in names} for bucket in buckets]
        distinct = tuple(each for i, each in enumerate(fitting) if each not in fitting[:i])
        for group in [(each,) for each in engines.architectures] or [()]:
            plan = engines.cache.get(
                place, Recipe(distinct, group, engines.refit), bars=engines.bars, cancelled=engines.cancelled
            )
            for here in engines.cache.read(plan)[1].architectures:
                made.append(_place(plan, out / here / f"{place.stem}.plan"))
    return made


def _place(plan: Path, target: Path) -> Path:
    """Copy an engine out of the cache, with its manifest."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(plan, target)
    shutil.copy(manifest_of(plan), manifest_of(target))
    return target


def free_dimensions(graph: Path) -> set[str]:
    """Return the names of the dimensions that a graph leaves free."""
    proto = onnx.load(graph, load_external_data=False)
    return {d.dim_param for entry in proto.graph.input for d in entry.type.tensor_type.shape.dim if d.dim_param}


def bucket_of(graph: Path, batch: tuple[int, int, int], side: int) -> Bucket:
    """Return the bucket of a graph for images of one size.

    Raises:
        PlanError: naming a dimension that is neither batch, height nor width.
    """
    names = free_dimensions(graph)
    known = {"batch": batch, "height": (side,) * 3, "width": (side,) * 3}
    for name in sorted(names - set(known)):
        raise PlanError(f"{graph.name}: dimension {name!r} is free; give its sizes")
    return {name: known[name] for name in names}


def _facts(model: Model) -> dict[str, Any]:
    """What a folder says of its model."""
    config, info = model.network.config, model.info
    assert model.folder is not None and config.sample_size is not None  # build_folder and the export saw to it
    return {
        "model_sha256": fingerprint(model.folder),
        "shape": [config.in_channels, config.sample_size, config.sample_size],
        "crop": info.crop,
        "classes": list(info.classes),
        "null_label": info.null_label,
        "labelled": config.num_class_embeds is not None,
        "two_time": info.target is not None,
    }


def describe(root: Path, presets: Mapping[str, Preset], facts: Mapping[str, Any]) -> str:
    """Write what ``read_folder`` reads; the SHA-256 of that."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    values = {
        "format": FORMAT,
        **facts,
        "presets": {name: asdict(preset) for name, preset in presets.items()},
        "default": next(iter(presets)),
        "files": {
            path.relative_to(root).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files
        },
        "versions": {"fastdiff": metadata.version("fastdiff"), "torch": torch.__version__, "onnx": onnx.__version__},
    }
    write_text(root / BUILT, json.dumps(values, indent=2) + "\n")
    return sha256(root / BUILT)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes its name when it is whole, and is gone if it fails.

    Raises:
        ArtifactError: if something has that name already.
    """
    if os.path.lexists(out):
        raise ArtifactError(f"{out}: exists already; name another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_name(f".{out.name}.{os.getpid()}.part")
    half.mkdir()
    try:
        yield half
        half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
