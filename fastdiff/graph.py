"""Capture a function of tensors in CUDA graphs, and replay it on other tensors of the same shapes."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UPS = 3  # runs before a capture: compiling, planning and first allocations may not happen within
GRAPHS = 8  # that are kept; the one that was not used for longest goes first


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # where the graph reads
    results: list[Tensor]  # where it writes
    form: Any  # how the results hang together
    seen: list[tuple[weakref.ref[Tensor], int] | None]  # what each input was copied from, and that tensor's version


class Captured:
    """A function whose calls on a GPU are graph replays; on a CPU it is called as it is.

    A graph is captured for each set of shapes, dtypes and other arguments, which have to be hashable. Arguments are
    copied to where the graph reads, unless the same tensor was given last time and is unchanged; results are copied
    out, so a caller may keep them. Calls from several threads and streams take turns.

    Args:
        fn: takes tensors, also inside tuples and dictionaries; returns tensors likewise. It must never ask the device
            a question, and must draw no random numbers of torch's own.
    """

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the function.

        Raises:
            TypeError: if an argument is neither a tensor nor hashable.
        """
        leaves, form = pytree.tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = next((t.device for t in tensors if t.device.type == "cuda"), None)
        if device is None or torch.cuda.is_current_stream_capturing():
            return self.fn(*arguments)
        key = (form, tuple(_kind(leaf) for leaf in leaves))
        with self._lock, torch.cuda.device(device):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._graphs[key] = self._capture(leaves, form)
                while len(self._graphs) > GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            _give(graph, tensors)
            graph.graph.replay()
            results = pytree.tree_unflatten([result.clone() for result in graph.results], graph.form)
            self._done = torch.cuda.Event()
            self._done.record()
            return results

    def forget(self) -> None:
        """Drop every graph: what the function reads by itself has moved."""
        with self._lock:
            self._graphs.clear()
            self._pool = None

    def _capture(self, leaves: Sequence[Any], form: Any) -> _Graph:
        held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = pytree.tree_unflatten(held, form)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.fn(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            results, spec = pytree.tree_flatten(self.fn(*arguments))
        self._pool = graph.pool()
        inputs = [leaf for leaf in held if isinstance(leaf, Tensor)]
        return _Graph(graph, inputs, results, spec, [None] * len(inputs))


def _kind(leaf: Any) -> Any:
    """What of an argument a graph is captured for: all but a tensor's numbers."""
    return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _give(graph: _Graph, tensors: Sequence[Tensor]) -> None:
    """Copy what changed since the last replay to where the graph reads."""
    for i, (mine, given) in enumerate(zip(graph.inputs, tensors, strict=True)):
        version = None if given.is_inference() else given._version  # inference tensors count no changes
        before = graph.seen[i]
        if before is not None and before[0]() is given and before[1] == version:
            continue
        mine.copy_(given)
        graph.seen[i] = None if version is None else (weakref.ref(given), version)
