"""Models to ONNX: checked, measured against the original, with a manifest beside the file. See docs/EXPORT.md."""

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
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.export.graph import Graph
from fastdiff.export.latents import conditioning, on_the_way, side_of
from fastdiff.export.networks import prepare_graph, step_graph, whole_graph
from fastdiff.export.parity import Exported, Inputs, Original, compare, table
from fastdiff.export.ranges import Ranges, ranges, too_large
from fastdiff.export.ranges import report as range_report
from fastdiff.export.sampler import NEGATIVE, Walk, eagerly, sampler_graph
from fastdiff.export.targets import target_of
from fastdiff.export.write import check, write_graph
from fastdiff.models.files import sha256, write_text
from fastdiff.models.unet import UNet
from fastdiff.models.weights import Model, fingerprint, weights_hash
from fastdiff.sampling.parts import initial_scale, make_solver, make_times
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.path import Path as NoisePath
from fastdiff.sampling.prediction import PREDICTIONS, Prediction
from fastdiff.sampling.table import build

HALVED = ("encoder_hidden_states", "timestep_cond")  # conditioning that a network computes with in its own type
LARGE = 200_000_000  # parameters from which parity is measured at one size alone


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
    """

    dtype: torch.dtype = torch.float32
    target: str = "onnxruntime"
    opset: int | None = None
    external_data: bool | None = None
    per_layer: bool = False
    parity: bool = True


USUAL = Options()
Trained = tuple[NoisePath, Prediction]


class Part(NamedTuple):
    """One graph of an artifact and the name of its file."""

    name: str
    graph: Graph


def prepare_name(file: Path) -> str:
    """The name of the graph that runs once, beside the one that runs at every step."""
    return f"{file.stem}.prepare{file.suffix}"


def export_unet(
    model: Model,
    file: str | os.PathLike[str],
    *,
    split: bool | None = None,
    control: bool = False,
    trained: Trained | None = None,
    options: Options = USUAL,
) -> Manifest:
    """Export the evaluation of a UNet; batch, height, width and the number of tokens are free.

    Args:
        model: float32.
        file: where to write; ``<file>.json`` gets the manifest. All files appear whole or not at all.
        split: two graphs: ``<file>`` runs at every step, ``<stem>.prepare.onnx`` once for a run: keys and values of
            the text, and the projections of all times. None: for networks that read text.
        control: take the residuals of ControlNets as inputs.
        trained: path and prediction, where the names of ``model.info`` do not say it.
        options: how.

    Returns:
        The manifest, with a parity report against the torch original.

    Raises:
        PlanError: on options that do not fit.
        ArtifactError: if a graph is not valid or does not reproduce the original.
    """
    unet, target, place = model.network, target_of(options.target, options.opset, options.dtype), Path(file)
    cases = _cases(unet, trained or meaning(model), control) if measured(options) else {}
    found = ranges_of(unet, cases, options)
    wide = too_large(found)
    if model.network.config.conditional if split is None else split:
        parts = [
            Part(prepare_name(place), prepare_graph(unet, target, options.dtype, wide)),
            Part(place.name, step_graph(unet, target, options.dtype, control, wide)),
        ]
    else:
        parts = [Part(place.name, whole_graph(unet, target, options.dtype, control, wide))]
    original = Original(unet, lambda given: _evaluate(unet, given), ("sample", *HALVED))
    kind = "step" if len(parts) == 2 else "unet"
    return finish(place, parts, kind, _identity(model), options, original, cases, found=found)


def ranges_of(unet: UNet, cases: Mapping[str, Inputs], options: Options) -> Ranges:
    """How large numbers get, where the type of the graph makes that a question."""
    if options.dtype != torch.float16 or not cases:
        return {}
    return ranges(unet, lambda given: _evaluate(unet, given), next(iter(cases.values())))


def _evaluate(unet: UNet, given: Inputs) -> dict[str, torch.Tensor]:
    names = [name for name in given if name.startswith("control_")]
    rest = {name: value for name, value in given.items() if name not in names}
    dtype = rest["sample"].dtype
    return {"output": unet(**rest, control=[given[name].to(dtype) for name in names])}


def measured(options: Options) -> bool:
    """Is the error of these graphs measured?"""
    return options.parity and options.dtype != torch.bfloat16


def _identity(model: Model) -> str:
    return weights_hash(model.network) if model.folder is None else fingerprint(model.folder)


def meaning(model: Model) -> Trained:
    """What a model was trained on and predicts."""
    return PATHS[model.info.path](), PREDICTIONS[model.info.prediction]


def _cases(unet: UNet, trained: Trained, control: bool) -> dict[str, Inputs]:
    """Batches and sizes to measure at, none of which the graph was told."""
    path, prediction = trained
    side = side_of(unet.config)
    half = max(side // 2, 2 ** (len(unet.config.block_out_channels) - 1))
    sizes = [(1, (side, side)), (2, (side, half)), (3, (half, side))]
    if sum(parameter.numel() for parameter in unet.parameters()) > LARGE:
        sizes = sizes[:1]
    cases = {
        f"batch {batch}, {h}x{w}": on_the_way(unet, path, prediction, batch, (h, w), batch) for batch, (h, w) in sizes
    }
    if control:
        for inputs in cases.values():
            inputs |= _residuals(unet, inputs)
    return cases


def _residuals(unet: UNet, inputs: Inputs) -> Inputs:
    """What a ControlNet could give: a tenth of what the UNet itself computes there."""
    given = dict(inputs)
    embedding = unet.embed(
        given.pop("timestep"), given.pop("class_labels", None), given.pop("target", None),
        **{name: given[name] for name in ("text_embeds", "time_ids", "timestep_cond") if name in given},
    )  # fmt: skip
    tokens = inputs.get("encoder_hidden_states")
    contexts = [] if tokens is None else unet.contexts(tokens)
    with torch.no_grad():
        rows = unet.split_rows(unet.time_rows(embedding))
        middle, skips = unet.encode(unet.conv_in(inputs["sample"]), rows, iter(contexts))
    names = [*(f"control_{i}" for i in range(len(skips))), "control_middle"]
    return {name: 0.1 * value for name, value in zip(names, [*skips, middle], strict=True)}


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


def export_sampler(
    model: Model,
    file: str | os.PathLike[str],
    num_inference_steps: int,
    sampler: str | None = None,
    guidance_scale: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    trained: Trained | None = None,
    options: Options = USUAL,
) -> Manifest:
    """Export a whole sampler as one graph, for runtimes that only know how to run a graph.

    The inputs are ``noise`` of variance 1 and what the network is told; where the sampler guides a network that reads
    text, ``negative_encoder_hidden_states`` and its kin too. Networks that draw images give ``images`` in [-1, 1],
    others ``latents``.

    Args:
        model: float32.
        file: where to write.
        num_inference_steps: steps unrolled into the graph.
        sampler: a deterministic one; by default ``flow_map`` for flow maps, else ``dpmpp_2m``.
        guidance_scale: by default the model's own.
        size: height and width; the model's own unless given.
        trained: as for ``export_unet``.
        options: how.

    Raises:
        PlanError: if the sampler draws noise, or options do not fit.
        ArtifactError: as ``export_unet``.
    """
    unet, info, target = model.network, model.info, target_of(options.target, options.opset, options.dtype)
    if not 1 <= num_inference_steps <= 1000:
        raise PlanError(f"num_inference_steps is {num_inference_steps}; allowed: 1 to 1000, unrolled into one graph")
    if size is None and unet.config.sample_size is None:
        raise PlanError("config.json of this model has no sample_size: give size")
    path, prediction = trained or meaning(model)
    name = sampler or ("flow_map" if prediction.two_time else "dpmpp_2m")
    strength = info.guidance_scale if guidance_scale is None else guidance_scale
    times = make_times(path, num_inference_steps)
    steps = build(path, prediction, make_solver(name, {}), times, guidance=strength)
    if steps.structure.draws:
        raise PlanError(f"sampler {name!r} draws noise at its steps; only deterministic samplers fit into one graph")
    images = not unet.config.conditional
    walk = Walk(steps, initial_scale(path, times[0]), info.null_label, info.crop if images else 0, images)
    sides = size or (unet.config.sample_size or 0,) * 2
    graph = sampler_graph(unet, walk, target, options.dtype, sides)
    cases = {f"batch {batch}": _starts(unet, graph, batch) for batch in (1, 3)} if measured(options) else {}
    original = Original(unet, eagerly(unet, walk), (*HALVED, *(NEGATIVE + name for name in HALVED)))
    facts = {"name": name, "num_inference_steps": num_inference_steps, "guidance_scale": strength}
    place = Path(file)
    return finish(place, [Part(place.name, graph)], "sampler", _identity(model), options, original, cases, facts)


def _starts(unet: UNet, graph: Graph, batch: int) -> Inputs:
    """Noise and conditioning for a whole walk."""
    draw = torch.Generator().manual_seed(batch)
    found = {
        name: torch.randn(batch, *map(int, value.shape[1:]), generator=draw)
        for name, value in graph.inputs.items()
        if name in ("noise", "concat")
    }
    found |= conditioning(unet, batch, batch)
    weak = {NEGATIVE + name: value for name, value in conditioning(unet, batch, batch + 100).items()}
    return found | {name: value for name, value in weak.items() if name in graph.inputs}
