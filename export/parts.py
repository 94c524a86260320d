"""The other networks of a pipeline as ONNX: decoders of autoencoders, ControlNets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.artifact import Manifest
from fastdiff.export.graph import Graph
from fastdiff.export.latents import conditioning
from fastdiff.export.networks import BATCH, HEIGHT, WIDTH, image_input, pair_inputs, prepare_graph
from fastdiff.export.onnx import HALVED, prepare_name
from fastdiff.export.parity import Inputs, Original
from fastdiff.export.publish import USUAL, Options, Part, finish, measured
from fastdiff.export.ranges import Ranges, ranges, too_large
from fastdiff.export.targets import Target, target_of
from fastdiff.export.trace import stand_in
from fastdiff.models.codec import Codec
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.weights import weights_hash


def decoder_graph(codec: Codec, target: Target, dtype: torch.dtype, wide: Ranges) -> Graph:
    """Latents as the loop leaves them -> images, about [-1, 1]."""
    graph = Graph("decoder", target)
    net = stand_in(codec, graph, dtype, wide)
    latents: Any = graph.input("latents", (BATCH, codec.latent_channels, HEIGHT, WIDTH), torch.float32)
    images: Any = net.decode(net.denormalise(latents).to(dtype))
    graph.output("images", images.to(torch.float32))
    return graph


def export_decoder(codec: Codec, file: str | os.PathLike[str], *, options: Options = USUAL) -> Manifest:
    """Export the decoder of an autoencoder, ``AutoencoderKL`` or tiny; batch, height and width are free.

    Args:
        codec: float32.
        file: where to write, as ``export_unet``.
        options: how. In float16, layers whose results would overflow stay in float32.

    Raises:
        PlanError: on options that do not fit.
        ArtifactError: if the graph is not valid or does not reproduce the original.
    """
    target, place = target_of(options.target, options.opset, options.dtype), Path(file)

    def call(given: Inputs) -> dict[str, Tensor]:
        return {"images": codec.decode(codec.denormalise(given["latents"]))}

    sizes = ((1, (16, 16)), (2, (16, 8)))
    cases = {f"batch {batch}, {h}x{w}": _latents(codec, batch, h, w) for batch, (h, w) in sizes}
    found = ranges(codec, call, cases["batch 1, 16x16"]) if options.dtype == torch.float16 else {}
    graph = decoder_graph(codec, target, options.dtype, too_large(found))
    original = Original(codec, call, ("latents",))
    told = cases if measured(options) else {}
    return finish(
        place, [Part(place.name, graph)], "decoder", weights_hash(codec), options, original, told, found=found
    )


def _latents(codec: Codec, batch: int, height: int, width: int) -> Inputs:
    """What the encoder makes of smooth pictures."""
    draw = torch.Generator().manual_seed(batch)
    coarse = torch.rand(batch, codec.in_channels, 4, 4, generator=draw) * 2 - 1
    size = height * codec.shrink, width * codec.shrink
    with torch.no_grad():
        return {"latents": codec.to_latents(torch.nn.functional.interpolate(coarse, size, mode="bilinear"))}  # type: ignore[operator]


def controlnet_graph(net: ControlNet, target: Target, dtype: torch.dtype) -> Graph:
    """``ControlNet.trunk``, from what ``prepare_graph`` gives."""
    graph = Graph("controlnet", target)
    traced: Any = stand_in(net, graph, dtype)
    x = image_input(graph, net.config).to(dtype)
    rows = graph.input("time_rows", (BATCH, net.row_width()), dtype)
    pairs = pair_inputs(graph, net, dtype)
    hint = graph.input("hint", (BATCH, net.config.block_out_channels[0], HEIGHT, WIDTH), dtype)
    *down, middle = traced.trunk(x, rows, pairs, hint)
    for i, residual in enumerate(down):
        graph.output(f"control_{i}", residual)
    graph.output("control_middle", middle)
    return graph


def export_controlnet(net: ControlNet, file: str | os.PathLike[str], *, options: Options = USUAL) -> Manifest:
    """Export a ControlNet: ``<stem>.prepare.onnx`` reads text, times and the picture, ``<file>`` runs at every step.

    What the latter gives, times the strength, is what ``export_unet(..., control=True)`` takes.

    Args:
        net: float32.
        file: where to write, as ``export_unet``.
        options: how.

    Raises:
        PlanError: on options that do not fit.
        ArtifactError: if a graph is not valid or does not reproduce the original.
    """
    target, place = target_of(options.target, options.opset, options.dtype), Path(file)
    parts = [
        Part(prepare_name(place), prepare_graph(net, target, options.dtype)),
        Part(place.name, controlnet_graph(net, target, options.dtype)),
    ]

    def call(given: Inputs) -> dict[str, Tensor]:
        told = dict(given)
        sample, picture, tokens = (told.pop(name) for name in ("sample", "picture", "encoder_hidden_states"))
        rows = net.time_rows(net.embed(told.pop("timestep"), told.pop("class_labels", None), **told))
        *down, middle = net.trunk(sample, rows, net.contexts(tokens), net.hint(picture))
        return {**{f"control_{i}": residual for i, residual in enumerate(down)}, "control_middle": middle}

    original = Original(net, call, ("sample", "picture", *HALVED))
    cases = {f"batch {batch}, 16x8": _pictures(net, batch) for batch in (1, 2)} if measured(options) else {}
    return finish(place, parts, "controlnet", weights_hash(net), options, original, cases)


def _pictures(net: ControlNet, batch: int) -> Inputs:
    draw = torch.Generator().manual_seed(batch)
    shrink = 2 ** (len(net.controlnet_cond_embedding.blocks) // 2)
    channels = net.controlnet_cond_embedding.conv_in.in_channels
    coarse = torch.rand(batch, channels, 4, 4, generator=draw)
    picture = torch.nn.functional.interpolate(coarse, (16 * shrink, 8 * shrink), mode="bilinear")
    sample = torch.randn(batch, net.config.in_channels, 16, 8, generator=draw)
    return {"sample": sample, "timestep": torch.full((batch,), 500.0), "picture": picture} | conditioning(
        net, batch, batch
    )
