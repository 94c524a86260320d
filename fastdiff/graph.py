"""Record a function of tensors in CUDA graphs, and replay it on other tensors of the same shapes."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UPS = 3  # runs before a recording: compiling, planning and first allocations may not happen within
GRAPHS = 8  # that are kept; the one that was not used for longest goes first


class Recorder(Protocol):
    """Something that records the calls of one kind of device."""

    device: str

    def recording(self) -> bool:
        """Is this thread inside a recording?"""

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make a device the current one."""

    def record(self, fn: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        """Warm up and record: a graph with ``replay()`` and ``pool()``, and what ``fn`` returned inside it."""

    def mark(self) -> Any:
        """A mark behind all work of this thread so far."""

    def wait(self, mark: Any) -> None:
        """Let this thread's further work wait for a mark; the host does not."""


class Cuda:
    """CUDA graphs."""

    device = "cuda"

    def recording(self) -> bool:
        """See ``Recorder``."""
        return torch.cuda.is_current_stream_capturing()

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """See ``Recorder``."""
        return torch.cuda.device(device)

    def record(self, fn: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        """See ``Recorder``."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = fn()
        return graph, result

    def mark(self) -> torch.cuda.Event:
        """See ``Recorder``."""
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """See ``Recorder``."""
        torch.cuda.current_stream().wait_event(mark)


CUDA: Recorder = Cuda()


class _Graph(NamedTuple):
    graph: Any
    inputs: list[Tensor]  # where the graph reads
    results: list[Tensor]  # where it writes
    form: Any  # how the results hang together
    seen: list[tuple[weakref.ref[Tensor], int] | None]  # what each input was copied from, and that tensor's version


class Captured:
    """A function whose calls on a GPU are graph replays; elsewhere, and inside a recording, it is called as it is.

    A graph is recorded for each set of shapes, dtypes and other arguments, which have to be hashable. Arguments are
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
        self._done: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the function.

        Raises:
            TypeError: if an argument is neither a tensor nor hashable.
        """
        leaves, form = pytree.tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = next((t.device for t in tensors if t.device.type == CUDA.device), None)
        if device is None or CUDA.recording():
            return self.fn(*arguments)
        key = (form, tuple(_kind(leaf) for leaf in leaves))
        with self._lock, CUDA.on(device):
            if self._done is not None:
                CUDA.wait(self._done)
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._graphs[key] = self._capture(leaves, form)
                while len(self._graphs) > GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            _give(graph, tensors)
            graph.graph.replay()
            results = pytree.tree_unflatten([result.clone() for result in graph.results], graph.form)
            self._done = CUDA.mark()
            return results

    def forget(self) -> None:
        """Drop every graph: what the function reads by itself has moved, or the memory is wanted."""
        with self._lock:
            self._graphs.clear()
            self._pool = None

    def _capture(self, leaves: Sequence[Any], form: Any) -> _Graph:
        held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = pytree.tree_unflatten(held, form)
        graph, result = CUDA.record(lambda: self.fn(*arguments), self._pool)
        results, spec = pytree.tree_flatten(result)
        self._pool = graph.pool()
        inputs = [leaf for leaf in held if isinstance(leaf, Tensor)]
        return _Graph(graph, inputs, results, spec, [None] * len(inputs))


def _kind(leaf: Any) -> Any:
    """What of an argument a graph is recorded for: all but a tensor's numbers."""
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
