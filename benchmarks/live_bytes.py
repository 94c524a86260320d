"""Bytes of tensors alive at once, counted at torch's dispatcher: what a run would take, without the device or the time.

On the ``meta`` device nothing is computed and nothing allocated. Not counted: what a library takes inside a call
(workspaces of convolutions), rounding by the allocator, and the context of the device's driver.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that calls within this context make: ``now`` and ``peak``, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call, and count what it made."""
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mine = {leaf.untyped_storage()._cdata for leaf in given}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in mine | self._known:
                self._count(leaf)
        return result

    def _count(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def weights(networks: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for net in networks for t in (*net.parameters(), *net.buffers()))
