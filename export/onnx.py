"""Models to ONNX: checked, measured against the original, with a manifest beside the file. See docs/EXPORT.md."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from fastdiff.artifact import Manifest
from fastdiff.calibration.file import CALIBRATED, load_for
from fastdiff.errors import PlanError
from fastdiff.export.adapters import DOWN, UP, adaptable, drawn, merged
from fastdiff.export.graph import Graph
from fastdiff.export.latents import conditioning, on_the_way, side_of
from fastdiff.export.networks import ANY, prepare_graph, step_graph, whole_graph
from fastdiff.export.parity import Inputs, Original
from fastdiff.export.publish import USUAL, Options, Part, finish, measured
from fastdiff.export.ranges import Ranges, ranges, too_large
from fastdiff.export.sampler import NEGATIVE, Walk, eagerly, sampler_graph
from fastdiff.export.targets import target_of
from fastdiff.models.unet import UNet
from fastdiff.models.weights import Model, fingerprint, weights_hash
from fastdiff.sampling.parts import initial_scale, make_solver, make_times
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.path import Path as NoisePath
from fastdiff.sampling.prediction import PREDICTIONS, Prediction
from fastdiff.sampling.table import StepTable, build

HALVED = ("encoder_hidden_states", "timestep_cond")  # conditioning that a network computes with in its own type
LARGE = 200_000_000  # parameters from which parity is measured at one size alone


Trained = tuple[NoisePath, Prediction]


def prepare_name(file: Path) -> str:
    """The name of the graph that runs once, beside the one that runs at every step."""
    return f"{file.stem}.prepare{file.suffix}"


def export_unet(
    model: Model,
    file: str | os.PathLike[str],
    *,
    split: bool | None = None,
    control: bool = False,
    adapters: bool = False,
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
        adapters: take the factors of LoRA adapters as inputs, for all linear layers of the transformers.
        trained: path and prediction, where the names of ``model.info`` do not say it.
        options: how.

    Returns:
        The manifest, with a parity report against the torch original.

    Raises:
        PlanError: on options that do not fit.
        ArtifactError: if a graph is not valid or does not reproduce the original.
    """
    unet, target, place = model.network, target_of(options.target, options.opset, options.dtype), Path(file)
    cases = _cases(unet, trained or meaning(model), control, options.size) if measured(options) else {}
    size = options.size or ANY
    if adapters and not adaptable(unet):
        raise PlanError("this network has no transformers, so it takes no adapters")
    for seed, inputs in enumerate(cases.values() if adapters else ()):
        inputs |= drawn(unet, seed)
    found = ranges_of(unet, cases, options)
    wide = too_large(found)
    if model.network.config.conditional if split is None else split:
        parts = [
            Part(prepare_name(place), prepare_graph(unet, target, options.dtype, wide, adapters)),
            Part(place.name, step_graph(unet, target, options.dtype, control, wide, adapters, size)),
        ]
    else:
        parts = [Part(place.name, whole_graph(unet, target, options.dtype, control, wide, adapters, size))]
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
    rest = {name: value for name, value in given.items() if name not in names and not name.endswith((DOWN, UP))}
    rest["control"] = [given[name].to(rest["sample"].dtype) for name in names]
    weights = merged(unet, given)
    return {"output": torch.func.functional_call(unet, weights, (), rest) if weights else unet(**rest)}


def _identity(model: Model) -> str:
    return weights_hash(model.network) if model.folder is None else fingerprint(model.folder)


def meaning(model: Model) -> Trained:
    """What a model was trained on and predicts."""
    return PATHS[model.info.path](), PREDICTIONS[model.info.prediction]


def _cases(unet: UNet, trained: Trained, control: bool, size: tuple[int, int] | None) -> dict[str, Inputs]:
    """Batches and sizes to measure at; where the graph has no size of its own, several that it was not told."""
    path, prediction = trained
    side = side_of(unet.config)
    half = max(side // 2, 2 ** (len(unet.config.block_out_channels) - 1))
    sizes = [(1, (side, side)), (2, (side, half)), (3, (half, side))]
    if size is not None:
        sizes = [(batch, size) for batch, _ in sizes]
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
        sampler: a deterministic one, or ``"calibrated"``; by default ``flow_map`` for flow maps, else ``dpmpp_2m``.
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
    steps, scale = table_of(model, (path, prediction), name, num_inference_steps, strength)
    if steps.structure.draws:
        raise PlanError(f"sampler {name!r} draws noise at its steps; only deterministic samplers fit into one graph")
    images = not unet.config.conditional
    walk = Walk(steps, scale, info.null_label, info.crop if images else 0, images)
    sides = size or (unet.config.sample_size or 0,) * 2
    graph = sampler_graph(unet, walk, target, options.dtype, sides)
    cases = {f"batch {batch}": _starts(unet, graph, batch) for batch in (1, 3)} if measured(options) else {}
    original = Original(unet, eagerly(unet, walk), (*HALVED, *(NEGATIVE + name for name in HALVED)))
    facts = {"name": name, "num_inference_steps": num_inference_steps, "guidance_scale": strength}
    place = Path(file)
    return finish(place, [Part(place.name, graph)], "sampler", _identity(model), options, original, cases, facts)


def table_of(
    model: Model, trained: Trained, sampler: str, num_inference_steps: int, strength: float
) -> tuple[StepTable, float]:
    """The step table of a sampler by name, and the standard deviation of its starting noise.

    Raises:
        ArtifactError: if a calibrated one is asked for, and the model's folder holds none that is its own.
        PlanError: if the sampler does not fit the model.
    """
    if sampler != CALIBRATED:
        times = make_times(trained[0], num_inference_steps)
        return build(*trained, make_solver(sampler, {}), times, guidance=strength), initial_scale(trained[0], times[0])
    found = load_for(trained, _identity(model), model.folder)
    found.calibration.check_strength(strength)
    plan = found.plan(num_inference_steps)
    return build(*trained, plan.solver, plan.times, guidance=strength), plan.initial_scale


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
