"""A stand-in for CUDA graphs on a CPU: records torch's calls, and replays them on the tensors they were recorded with.

Like a CUDA graph it knows nothing of Python: what the function read from the host, or a tensor it was not given, stays
as it was at the recording. So a function that replays right here reads its inputs where a graph would read them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"}  # what a capture refuses
EMPTY = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}


class Recording(TorchDispatchMode):
    """The calls of one run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS:
            raise RuntimeError(f"{name} asks the device a question")
        result = func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        view = all(t.untyped_storage().data_ptr() in storages for t in made) and not func._schema.is_mutable
        if not view and name not in EMPTY:
            self.calls.append((func, args, kwargs, [] if func._schema.is_mutable else made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = [leaf for leaf in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(made, again, strict=False):
                old.copy_(new)

    def pool(self) -> None:
        return None


class Recorder:
    """In place of ``fastdiff.graph.CUDA``."""

    device = "cpu"

    def __init__(self) -> None:
        self.graphs: list[Recording] = []
        self._inside = False

    def recording(self) -> bool:
        return self._inside

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    def record(self, fn: Any, pool: Any) -> tuple[Recording, Any]:
        self._inside = True
        try:
            fn()
            recording = Recording()
            with recording:
                result = fn()
        finally:
            self._inside = False
        self.graphs.append(recording)
        return recording, result

    def mark(self) -> None:
        return None

    def wait(self, mark: None) -> None:
        raise AssertionError("no mark was made")
