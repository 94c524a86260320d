"""Low-rank adapters as inputs of a graph: the products with their two factors are added to those with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.export.dims import Dim
from fastdiff.export.graph import Graph
from fastdiff.models.unet import Encoder

RANK = Dim.of("rank")  # of all adapters of a call, the smaller ones filled up with zeros
DOWN, UP = ".lora_down", ".lora_up"
MEASURED = 4  # the rank at which the error is measured


def adaptable(net: nn.Module) -> dict[str, nn.Linear]:
    """The layers that take an adapter: all linear ones of the transformers."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and ".transformer_blocks." in name
    }


def declare(graph: Graph, unet: Encoder, dtype: torch.dtype) -> list[str]:
    """Declare ``<layer>.lora_down [in, rank]`` and ``<layer>.lora_up [rank, out]`` for every layer; return their names.

    Strength and ``alpha / rank`` belong into the second.
    """
    names = []
    for name, layer in adaptable(unet).items():
        down = graph.input(name + DOWN, (layer.in_features, RANK), dtype)
        up = graph.input(name + UP, (RANK, layer.out_features), dtype)
        graph.adapters[f"{name}.weight"] = down, up
        names += [down.name, up.name]
    return names


def drawn(unet: Encoder, seed: int) -> dict[str, Tensor]:
    """Adapters that change every layer by about a tenth."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, layer in adaptable(unet).items():
        size = 0.3 / (layer.in_features * MEASURED) ** 0.25
        found[name + DOWN] = size * torch.randn(layer.in_features, MEASURED, generator=draw)
        found[name + UP] = size * torch.randn(MEASURED, layer.out_features, generator=draw)
    return found


def merged(unet: Encoder, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """The weights of the layers that adapters are given for, with these merged."""
    return {
        f"{name}.weight": nn.Parameter(layer.weight + (given[name + DOWN] @ given[name + UP]).t(), requires_grad=False)
        for name, layer in adaptable(unet).items()
        if name + DOWN in given
    }
