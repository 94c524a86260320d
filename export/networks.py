"""The graphs that are exported, made by running the project's own networks: a UNet, its two halves, whole samplers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

from fastdiff.export import layers as _layers  # noqa: F401  (what layers become is registered when it is imported)
from fastdiff.export import shapes as _shapes  # noqa: F401
from fastdiff.export.adapters import declare
from fastdiff.export.dims import Dim, Size
from fastdiff.export.graph import Graph
from fastdiff.export.symbol import Symbol
from fastdiff.export.targets import Target
from fastdiff.export.trace import stand_in
from fastdiff.models.config import UNetConfig
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.unet import Encoder, UNet

BATCH, ROWS, HEIGHT, WIDTH, TOKENS = (Dim.of(name) for name in ("batch", "rows", "height", "width", "tokens"))
Sides = tuple[Size, Size]
ANY: Sides = (HEIGHT, WIDTH)


class Given(NamedTuple):
    """An input of a UNet."""

    shape: tuple[Size, ...]  # without the first axis
    dtype: torch.dtype


def embedded(unet: Encoder) -> dict[str, Given]:
    """What becomes part of the time embedding, by name, ``timestep`` first."""
    config = unet.config
    found = {"timestep": Given((), torch.float32)}
    if config.num_class_embeds:
        found["class_labels"] = Given((), torch.int64)
    if unet.target is not None:
        found["target"] = Given((), torch.float32)
    if config.addition_embed_type is not None:
        sizes = 6 * (config.addition_time_embed_dim or 0)
        pooled = (config.projection_class_embeddings_input_dim or 0) - sizes
        found["text_embeds"] = Given((pooled,), torch.float32)
        found["time_ids"] = Given((6,), torch.float32)
    if config.time_cond_proj_dim is not None:
        found["timestep_cond"] = Given((config.time_cond_proj_dim,), torch.float32)
    return found


def _declared(graph: Graph, given: dict[str, Given], first: Size) -> dict[str, Symbol]:
    return {name: graph.input(name, (first, *what.shape), what.dtype) for name, what in given.items()}


def tokens_width(config: UNetConfig) -> int:
    """Width of the conditioning's tokens, which all blocks share.

    ``cross_attention_dim`` may be given for each level; they read the same tokens.
    """
    found = config.cross_attention_dim
    return found if isinstance(found, int) else found[0]


def _tokens(graph: Graph, config: UNetConfig) -> Symbol:
    return graph.input("encoder_hidden_states", (BATCH, TOKENS, tokens_width(config)), torch.float32)


def image_input(graph: Graph, config: UNetConfig, size: Sides = ANY) -> Symbol:
    """Declare what the network looks at, ``[batch, C, height, width]``."""
    return graph.input("sample", (BATCH, config.in_channels, *size), torch.float32)


def control_shapes(unet: UNet, size: Sides = ANY) -> list[tuple[Size, ...]]:
    """The shapes of a ControlNet's residuals, the middle's last, as ``UNet.trunk`` adds them."""
    config, (height, width) = unet.config, size
    found: list[tuple[Size, ...]] = [(BATCH, config.block_out_channels[0], height, width)]
    for level in config.down_levels():
        found += [(BATCH, level.channels, height, width)] * level.resnets
        if level.resample is not None:
            # a convolution of stride 2 rounds up; without padding, and by means of pixels, it rounds down
            up = level.resample == "conv" and config.downsample_padding == 1
            height, width = ((side - 1) // 2 + 1 if up else (side - 2) // 2 + 1 for side in (height, width))
            found.append((BATCH, level.channels, height, width))
    return [*found, (BATCH, config.block_out_channels[-1], height, width)]


def _control(graph: Graph, unet: UNet, dtype: torch.dtype, size: Sides) -> list[Symbol]:
    shapes = control_shapes(unet, size)
    names = [*(f"control_{i}" for i in range(len(shapes) - 1)), "control_middle"]
    return [graph.input(name, shape, dtype) for name, shape in zip(names, shapes, strict=True)]


def whole_graph(
    unet: UNet,
    target: Target,
    dtype: torch.dtype,
    control: bool = False,
    wide: Collection[str] = (),
    adapters: bool = False,
    size: Sides = ANY,
) -> Graph:
    """One evaluation, from what diffusers' UNets are given."""
    graph = Graph("unet", target)
    net = stand_in(unet, graph, dtype, wide)
    factors = declare(graph, unet, dtype) if adapters else ()
    given: dict[str, Any] = {"sample": image_input(graph, unet.config, size).to(dtype)}
    given |= _declared(graph, embedded(unet), BATCH)
    if unet.config.conditional:
        given["encoder_hidden_states"] = _tokens(graph, unet.config).to(dtype)
    if control:
        given["control"] = _control(graph, unet, dtype, size)
    graph.output("output", net(**given).to(torch.float32))
    graph.drop_unread(factors)
    return graph


def prepare_graph(
    unet: Encoder, target: Target, dtype: torch.dtype, wide: Collection[str] = (), adapters: bool = False
) -> Graph:
    """What does not change from step to step: time rows ``[rows, P]``, and keys and values of the text.

    Times, labels and sizes have an axis of their own: a run has few different ones, however many images it draws.
    """
    graph = Graph("prepare", target)
    net = stand_in(unet, graph, dtype, wide)
    factors = declare(graph, unet, dtype) if adapters else ()
    given: dict[str, Any] = dict(_declared(graph, embedded(unet), ROWS))
    rows = net.time_rows(net.embed(**given))
    graph.output("time_rows", rows.to(dtype))
    if unet.config.conditional:
        pairs = net.contexts(_tokens(graph, unet.config).to(dtype))  # type: ignore[arg-type]
        for i, (keys, values) in enumerate(pairs):
            graph.output(f"keys_{i}", keys)  # type: ignore[arg-type]
            graph.output(f"values_{i}", values)  # type: ignore[arg-type]
    if isinstance(net, ControlNet):
        reads = net.controlnet_cond_embedding
        grown = 2 ** (len(reads.blocks) // 2)
        shape = (BATCH, reads.conv_in.in_channels, HEIGHT * grown, WIDTH * grown)
        hint: Any = net.hint(graph.input("picture", shape, torch.float32).to(dtype))
        graph.output("hint", hint)
    graph.drop_unread(factors)
    return graph


def pair_inputs(graph: Graph, unet: Encoder, dtype: torch.dtype) -> list[tuple[Symbol, Symbol]]:
    """Declare keys and values of the text, ``[batch, heads, tokens, d]`` each, for every attention that reads them."""
    pairs = []
    for i, attention in enumerate(unet.crossing()):
        heads, width = attention.heads, attention.to_k.out_features
        shape = (BATCH, heads, TOKENS, width // heads)
        pairs.append((graph.input(f"keys_{i}", shape, dtype), graph.input(f"values_{i}", shape, dtype)))
    return pairs


def step_graph(
    unet: UNet,
    target: Target,
    dtype: torch.dtype,
    control: bool = False,
    wide: Collection[str] = (),
    adapters: bool = False,
    size: Sides = ANY,
) -> Graph:
    """What runs at every step: ``UNet.trunk``, from what ``prepare_graph`` gives."""
    graph = Graph("step", target)
    net = stand_in(unet, graph, dtype, wide)
    factors = declare(graph, unet, dtype) if adapters else ()
    x = image_input(graph, unet.config, size).to(dtype)
    rows = graph.input("time_rows", (BATCH, unet.row_width()), dtype)
    pairs: Sequence[Any] = pair_inputs(graph, unet, dtype) if unet.config.conditional else ()
    residuals: Sequence[Any] = _control(graph, unet, dtype, size) if control else ()
    y: Any = net.trunk(x, rows, pairs, residuals)  # type: ignore[arg-type]
    graph.output("output", y.to(torch.float32))
    graph.drop_unread(factors)
    return graph
