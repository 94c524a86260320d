"""``UNet.trunk`` as a flat plan for each shape that it meets, on a GPU captured in a graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.backends.eager import Prepared, UNetNetwork
from fastdiff.backends.flat.plan import FlatPlan
from fastdiff.backends.lower import Shape, keys_of, lower
from fastdiff.graph import Captured
from fastdiff.models.unet import TokenPair, UNet
from fastdiff.sampling.denoiser import Cond

PLANS = 8  # shapes that are kept ready


class FlatTrunk:
    """``UNet.trunk`` in any dtype on any device that torch has. Calls may come from several threads.

    Args:
        unet: on its device, channels-last; its ``ops`` are the kernels.
    """

    def __init__(self, unet: UNet):
        self.unet = unet
        self._plans: OrderedDict[Shape, FlatPlan] = OrderedDict()
        self._lock = threading.Lock()
        self._captured = Captured(self.plain)
        self._places: list[int] = []
        self._versions: list[int | None] = []

    def __call__(
        self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair] = (), control: Sequence[Tensor] = ()
    ) -> Tensor:
        """See ``UNet.trunk``; what records gradients goes there."""
        if torch.is_grad_enabled() and (x.requires_grad or time_rows.requires_grad):
            return self.unet.trunk(x, time_rows, contexts, control)
        return self._captured(x, time_rows, tuple(contexts), tuple(control))

    @torch.no_grad()
    def plain(
        self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair] = (), control: Sequence[Tensor] = ()
    ) -> Tensor:
        """The same, its calls issued one by one: what others may capture."""
        keys = tuple(keys_of(i, k) for i, (k, _) in enumerate(contexts))
        shape = Shape(tuple(x.shape), tuple(time_rows.shape), keys, tuple(tuple(more.shape) for more in control))
        given = {"x": x, "rows": time_rows} | {f"control{i}": more for i, more in enumerate(control)}
        for i, (k, v) in enumerate(contexts):
            given |= {f"keys{i}": k, f"values{i}": v}
        return self._plan(shape).run(given)

    def _plan(self, shape: Shape) -> FlatPlan:
        with self._lock:
            if shape not in self._plans:
                upcast = self.unet.config.upcast_attention
                self._plans[shape] = FlatPlan(lower(self.unet, shape), self.unet.ops, upcast=upcast)
                while len(self._plans) > PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(shape)
            return self._plans[shape]

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow parameters that were changed in place or replaced. Call it before a run, not at every step.

        What was changed in place needs no new capture; what lies elsewhere now does.
        """
        parameters = list(self.unet.parameters())
        places = [p.data_ptr() for p in parameters]
        versions = [None if p.is_inference() else p._version for p in parameters]
        with self._lock:
            if places != self._places:
                self._plans.clear()
                self._captured.forget()
            elif versions != self._versions or None in versions:
                for plan in self._plans.values():
                    plan.refresh()
            self._places, self._versions = places, versions


class FlatNetwork(UNetNetwork):
    """A ``UNetNetwork`` whose trunk is a flat plan."""

    trunk: FlatTrunk

    def __init__(self, unet: UNet):
        super().__init__(unet, FlatTrunk(unet))

    def plain(self) -> UNetNetwork:
        """The same network without a graph of its own, for whoever captures more than one evaluation."""
        return UNetNetwork(self.unet, self.trunk.plain)

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``."""
        self.trunk.refresh()
        return super().prepare(cond, times)
