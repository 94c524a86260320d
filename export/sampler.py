"""A whole sampler as one graph: the project's loop, run with values that add nodes instead of computing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.eager import UNetNetwork
from fastdiff.export.dims import Size
from fastdiff.export.graph import Graph
from fastdiff.export.networks import BATCH, TOKENS, embedded, tokens_width
from fastdiff.export.operators import as_symbol
from fastdiff.export.symbol import Symbol
from fastdiff.export.targets import Target
from fastdiff.export.trace import stand_in
from fastdiff.models.unet import UNet
from fastdiff.sampling.denoiser import Cond, Network
from fastdiff.sampling.loop import sample
from fastdiff.sampling.parts import plan
from fastdiff.sampling.table import StepTable

NEGATIVE = "negative_"  # how inputs are named that say what to guide away from


@dataclass(frozen=True)
class Walk:
    """What to run: a table of steps, and what lies around it.

    Args:
        table: of the sampler.
        scale: of the starting noise, which the caller gives with variance 1.
        null_label: the class that stands for none, to guide away from.
        crop: pixels to cut off at each border of the result.
        images: the result is images, and clamped to [-1, 1]; else latents.
    """

    table: StepTable
    scale: float
    null_label: int | None = None
    crop: int = 0
    images: bool = True

    @property
    def guided(self) -> bool:
        """Does a row guide?"""
        return any(row.guided for row in self.table.structure.rows)

    def run(self, network: Network, given: Mapping[str, Any], table: StepTable | None = None) -> Any:
        """``noise [B, C, H, W]`` and conditioning -> the result, ``[B, C, H', W']``.

        Args:
            network: the UNet.
            given: tensors, or values of a graph, by the names of the inputs.
            table: the same one, of values of a graph.
        """
        extra = {name: value for name, value in given.items() if name not in ("noise", "class_labels")}
        weak = {name.removeprefix(NEGATIVE): value for name, value in extra.items() if name.startswith(NEGATIVE)}
        strong = {name: value for name, value in extra.items() if not name.startswith(NEGATIVE)}
        labels, uncond = given.get("class_labels"), None
        if self.guided:
            null = labels if labels is None or self.null_label is None else torch.full_like(labels, self.null_label)
            uncond = Cond(null, {**strong, **weak} or None)
        steps = table or self.table
        denoiser, prepared = plan(network, Cond(labels, strong or None), uncond, steps)
        x = sample(denoiser, given["noise"] * self.scale, steps, None, prepared)
        if self.crop:
            x = x[:, :, self.crop : -self.crop, self.crop : -self.crop]
        return x.clamp(-1, 1) if self.images else x


class Traced(NamedTuple):
    """Prepared: for values of a graph."""

    times: Tensor  # [1, R, 2]
    cond: Cond
    contexts: list[tuple[Any, Any]]


class TracedNetwork:
    """A UNet of graph values for the loop: keys and values of the text are made once, time rows at each step."""

    def __init__(self, net: UNet, dtype: torch.dtype):
        self.net, self.dtype = net, dtype

    def prepare(self, cond: Cond, times: Tensor) -> Traced:
        """See ``Network.prepare``."""
        extra = dict(cond.extra or {})
        tokens = extra.pop("encoder_hidden_states", None)
        contexts = [] if tokens is None else self.net.contexts(tokens.to(self.dtype))
        return Traced(times, Cond(cond.label, extra or None), contexts)

    def __call__(self, x: Any, row_index: Any, prepared: Traced) -> Any:
        """See ``Network.__call__``; the rows of a table are walked in order, so their numbers are known."""
        batch, told = x.shape[0], prepared.times[0, int(row_index.known.flatten()[0])]
        extra = {name: value[:batch] for name, value in (prepared.cond.extra or {}).items()}
        concat = extra.pop("concat", None)
        label = prepared.cond.label
        if self.net.target is not None:
            extra["target"] = told[1:]
        time = as_symbol(x.graph, told[:1], torch.float32)
        rows = self.net.time_rows(self.net.embed(time, None if label is None else label[:batch], **extra))
        contexts = [(keys[:batch], values[:batch]) for keys, values in prepared.contexts]
        seen = x if concat is None else torch.cat([x, concat], dim=1)
        return self.net.trunk(seen.to(self.dtype), rows, contexts).to(torch.float32)  # type: ignore[arg-type]


def sampler_graph(unet: UNet, walk: Walk, target: Target, dtype: torch.dtype, size: tuple[Size, Size]) -> Graph:
    """The graph of a walk, with its inputs: ``noise``, and whatever the network is told."""
    graph = Graph("sampler", target)
    net, config = stand_in(unet, graph, dtype), unet.config
    channels = min(config.in_channels, config.out_channels)
    given: dict[str, Symbol] = {"noise": graph.input("noise", (BATCH, channels, *size), torch.float32)}
    told: dict[str, tuple[Any, torch.dtype]] = {
        name: (what.shape, what.dtype) for name, what in embedded(unet).items() if name not in ("timestep", "target")
    }
    if config.conditional:
        told["encoder_hidden_states"] = (TOKENS, tokens_width(config)), torch.float32
    if config.in_channels > channels:
        told["concat"] = (config.in_channels - channels, *size), torch.float32
    for name, (shape, dtype_) in told.items():
        given[name] = graph.input(name, (BATCH, *shape), dtype_)
    if walk.guided:
        for name in ("encoder_hidden_states", "text_embeds", "time_ids"):
            if name in told:
                given[NEGATIVE + name] = graph.input(NEGATIVE + name, (BATCH, *told[name][0]), told[name][1])
    index: Any = graph.constant(walk.table.index)
    table = StepTable(walk.table.values, index, walk.table.structure)
    result = walk.run(TracedNetwork(net, dtype), given, table)  # type: ignore[arg-type]
    graph.output("images" if walk.images else "latents", result)
    return graph


def eagerly(unet: UNet, walk: Walk) -> Any:
    """The same walk in torch, from the same inputs."""
    name = "images" if walk.images else "latents"
    return lambda given: {name: walk.run(UNetNetwork(unet), given)}
