"""Running a network with values that add nodes to a graph: the network is the only description of itself."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fastdiff.export.doubling import upsample_conv
from fastdiff.export.graph import Graph
from fastdiff.export.symbol import Symbol
from fastdiff.kernels import REFERENCE

Net = TypeVar("Net", bound=nn.Module)
OPS = REFERENCE._replace(upsample_conv=upsample_conv)


def stand_in(network: Net, graph: Graph, dtype: torch.dtype, wide: Collection[str] = ()) -> Net:
    """A copy of a network whose parameters are values of the graph, of this float type; no number is copied.

    Layers named in ``wide`` compute in float32 all the same, and what they give stays in it until a layer that does not
    reads it. Its modules enter and leave the graph's scopes, and leave there which value each of them gave.
    """
    sources = dict(network.named_parameters())
    graph.wide.update(wide)
    result = copy.deepcopy(network, {id(parameter): parameter for parameter in sources.values()})
    values = {
        id(source): graph.weight(
            name, source, torch.float32 if name.rpartition(".")[0] in wide else dtype, source.shape
        )
        for name, source in sources.items()
    }
    for name, module in result.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = values[id(parameter)]  # type: ignore[assignment]
        if isinstance(getattr(module, "ops", None), tuple):
            module.ops = OPS  # type: ignore[assignment]  # whatever runs it, this says what it is
        if name:
            module.register_forward_pre_hook(_Enter(graph, name))
            module.register_forward_hook(_Leave(graph, name))
    return result


class _Enter:
    def __init__(self, graph: Graph, name: str):
        self.graph, self.name = graph, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.graph.enter(self.name)


class _Leave(_Enter):
    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:  # type: ignore[override]
        self.graph.leave()
        if isinstance(result, Symbol):
            self.graph.layers.setdefault(self.name, result.name)


@contextmanager
def watched(network: nn.Module, seen: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keep what each module of a network gives when it runs first, under the names that ``stand_in`` uses."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, torch.Tensor):
                seen.setdefault(name, result)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in network.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
