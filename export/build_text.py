"""``fastdiff build`` of text-to-image models: tokenizers, text encoders, UNet and decoder, and the samplers' tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from fastdiff.built.folder import STEPS, Preset, Text, Words
from fastdiff.built.tables import to_json
from fastdiff.errors import PlanError
from fastdiff.export.build import (
    UNET,
    Engines,
    Wanted,
    appearing,
    build_graph,
    describe,
    planned,
    preset_name,
    write_tables,
)  # fmt: skip
from fastdiff.export.onnx import Trained, export_unet
from fastdiff.export.parts import export_decoder
from fastdiff.export.publish import Options
from fastdiff.export.tensorrt import Bucket
from fastdiff.export.text import export_text_encoder, write_tokenizer
from fastdiff.models.codec import Codec
from fastdiff.models.text import TextEncoder
from fastdiff.models.weights import Model, fingerprint
from fastdiff.sampling.parts import initial_scale, make_solver, make_times
from fastdiff.sampling.run import Planner
from fastdiff.sampling.table import StepTable, build

DECODER, USUAL_SIDE, USUAL_STEPS = "decoder.onnx", 64, 50


class TextModel(NamedTuple):
    """A text-to-image model, all of it float32.

    Args:
        unet: loaded from a folder.
        decoder: the autoencoder.
        encoders: one text encoder, or SDXL's two.
        sampler: the scheduler that came with it.
        sampler_name: of its class.
        trained: path and prediction, for other samplers.
        guidance_scale: of presets that name none.
        zero_empty_prompt: SDXL: no negative prompt is zeros, not the encoded empty text.
    """

    unet: Model
    decoder: Codec
    encoders: tuple[TextEncoder, ...]
    sampler: Planner
    sampler_name: str
    trained: Trained
    guidance_scale: float
    zero_empty_prompt: bool


def build_text_folder(
    model: TextModel,
    out: str | os.PathLike[str],
    wanted: Sequence[Wanted],
    dtype: torch.dtype = torch.float32,
    engines: Engines | None = None,
    sizes: Sequence[Bucket] = (),
) -> str:
    """Build a deployable folder of a text-to-image model; it appears whole or not at all.

    Args:
        model: to build.
        out: must not exist yet.
        wanted: presets; the first is the default. Height, width and prompts are left to the call.
        dtype: in which graphs compute; an autoencoder that overflows in float16 stays float32.
        engines: also build engines of all networks, for ``engines.batch`` images.
        sizes: heights and widths in latents that engines are built for, a profile each; the model's own unless given.

    Returns:
        The SHA-256 of its description, ``built.json``.

    Raises:
        PlanError: on presets that cannot be, sizes that are none, or a network that reads more than text.
        ArtifactError: if ``out`` exists, or an export or a build fails.
    """
    _check(model, wanted, sizes)
    presets, tables = planned(wanted, partial(_preset, model))
    with appearing(Path(out)) as root:
        encoders = _export(model, root, Options(dtype))
        for encoder, words in zip(model.encoders, encoders, strict=True):
            write_tokenizer(encoder, root / words.tokenizer)
        write_tables(root, tables)
        if engines is not None:
            plans = _build_engines(model, root, list(tables.values()), engines, sizes, dtype)
            for preset in presets.values():
                preset.plans.update(plans)
        config = model.unet.network.config
        sized, width = config.addition_embed_type is not None, config.time_cond_proj_dim
        text = Text(encoders, DECODER, model.decoder.grow, sized, model.zero_empty_prompt, width)
        return describe(root, presets, _facts(model) | {"text": asdict(text)})


def _export(model: TextModel, root: Path, options: Options) -> tuple[Words, ...]:
    """Export every network; how prompts are read."""
    export_unet(model.unet, root / UNET, trained=model.trained, options=options)
    upcast = options.dtype == torch.float16 and getattr(model.decoder.config, "force_upcast", False)
    export_decoder(model.decoder, root / DECODER, options=options._replace(dtype=torch.float32) if upcast else options)
    sized, found = model.unet.network.config.addition_embed_type is not None, []
    for i, encoder in enumerate(model.encoders):
        found.append(Words(f"tokenizer_{i + 1}.json", f"text_encoder_{i + 1}.onnx"))
        export_text_encoder(encoder, root / found[-1].graph, penultimate=sized, options=options)
    return tuple(found)


def _build_engines(
    model: TextModel, root: Path, tables: Sequence[StepTable], engines: Engines, sizes: Sequence[Bucket],
    dtype: torch.dtype,
) -> dict[str, str]:  # fmt: skip
    """Build an engine of every graph for every architecture, ``<arch>/<graph>.plan``; those of the UNet."""
    guided = any(row.guided for table in tables for row in table.structure.rows)
    low, usual, most = engines.batch
    asked = low, usual * (1 + guided), most * (1 + guided)  # a guided row asks the network for both estimates at once
    calls = [len(table.index) for table in tables]
    side, length = model.unet.network.config.sample_size or USUAL_SIDE, model.encoders[0].tokens([""]).shape[1]
    sides = [{"height": (side,) * 3, "width": (side,) * 3} | dict(size) for size in sizes or ({},)]
    # rows of time are those of a walk, or of every image where each is told something of its own (SDXL)
    once = {"rows": (min(calls), calls[0], max(calls) * asked[2]), "tokens": (length,) * 3}
    options = Options(dtype, "tensorrt-rtx" if engines.cache.library.rtx else "tensorrt")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words = _export(model, folder, options)
        network = [each | once | {"batch": asked} for each in sides]
        plans = build_graph(folder / UNET, root, network, engines)
        build_graph(folder / DECODER, root, [each | {"batch": engines.batch} for each in sides], engines)
        for each in words:
            build_graph(folder / each.graph, root, [{"batch": engines.batch}], engines)
    found = [plan.relative_to(root) for plan in plans if plan.stem == Path(UNET).stem]
    return {plan.parent.name: plan.as_posix() for plan in found}


def _check(model: TextModel, wanted: Sequence[Wanted], sizes: Sequence[Bucket]) -> None:
    config = model.unet.network.config
    if any(one.fused for one in wanted):
        raise PlanError("a folder of a text-to-image model holds one evaluation, not a whole sampler: leave --fuse out")
    if config.in_channels != model.decoder.latent_channels:
        raise PlanError("this network paints into a picture; a folder is built of networks that read text alone")
    for name in sorted({name for size in sizes for name in size} - {"height", "width"}):
        raise PlanError(f"a bucket bounds dimension {name!r}; of a text-to-image model's engines: height, width")


def _preset(model: TextModel, wanted: Wanted) -> tuple[str, Preset, StepTable]:
    """Plan one way to draw."""
    steps = USUAL_STEPS if wanted.num_inference_steps is None else wanted.num_inference_steps
    asked = float(model.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale)
    reads = model.unet.network.config.time_cond_proj_dim is not None  # the strength, which then guides by itself
    strength = asked if reads or asked > 1 else 1.0  # less is none, as in a call
    if wanted.sampler is None:
        sampler = model.sampler_name
        path, prediction, solver, times, scale, clip = model.sampler.plan(steps)
    else:
        sampler, (path, prediction), clip = wanted.sampler, model.trained, None
        solver, times = make_solver(sampler, {}), make_times(path, steps)
        scale = initial_scale(path, times[0])
    table = build(path, prediction, solver, times, guidance=1.0 if reads else strength, clip=clip)
    preset = Preset(STEPS, UNET, sampler, steps, strength, float(scale), to_json(table.structure), {})
    return preset_name(sampler, steps), preset, table


def _facts(model: TextModel) -> dict[str, Any]:
    """What ``read_folder`` reads of the network."""
    folder, config = model.unet.folder, model.unet.network.config
    if folder is None:
        raise PlanError("build needs a model that was loaded from a folder, so that its hash can be recorded")
    side = config.sample_size or USUAL_SIDE
    return {
        "model_sha256": fingerprint(folder),
        "shape": [model.decoder.latent_channels, side, side],
        "crop": 0,
        "classes": [],
        "null_label": None,
        "labelled": False,
        "two_time": False,
    }
