"""``UNet.trunk`` as a flat plan for each shape that it meets, on a GPU captured in a graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.eager import Prepared, UNetNetwork
from fastdiff.backends.flat.choose import PLAN, fastest
from fastdiff.backends.flat.plan import FlatPlan
from fastdiff.backends.lower import Shape, keys_of, lower
from fastdiff.graph import Captured
from fastdiff.kernels import Ops, in_turn
from fastdiff.models.unet import TokenPair, UNet
from fastdiff.sampling.denoiser import Cond

PLANS = 8  # shapes that are kept ready


class Given(NamedTuple):
    """The arguments of one call of ``UNet.trunk``."""

    x: Tensor
    time_rows: Tensor
    contexts: tuple[TokenPair, ...]
    control: tuple[Tensor, ...]

    def describe(self) -> str:
        """What the time of a call depends on."""
        told = [self.x, *(keys for keys, _ in self.contexts[:1]), *self.control[:1]]
        return " ".join([str(self.x.dtype), *(str(tuple(t.shape)) for t in told)])


class FlatTrunk:
    """``UNet.trunk`` in any dtype on any device that torch has. Calls may come from several threads.

    Args:
        unet: on its device, channels-last; its ``ops`` are the kernels.
        never_slower: on a GPU time the UNet's own forward pass too, captured likewise, once for each shape, and use it
            where it is faster.
    """

    def __init__(self, unet: UNet, never_slower: bool = False):
        self.unet, self.never_slower = unet, never_slower
        self._plans: OrderedDict[Shape, FlatPlan] = OrderedDict()
        self._lock = threading.RLock()
        self._ways = {PLAN: Captured(self.alone()), "eager": Captured(self._eager)}
        self._chosen: dict[str, str] = {}  # shapes -> a way
        self._places: list[int] = []
        self._versions: list[int | None] = []

    def __call__(
        self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair] = (), control: Sequence[Tensor] = ()
    ) -> Tensor:
        """See ``UNet.trunk``; what records gradients goes there."""
        if torch.is_grad_enabled() and (x.requires_grad or time_rows.requires_grad):
            return self.unet.trunk(x, time_rows, contexts, control)
        given = Given(x, time_rows, tuple(contexts), tuple(control))
        return self._ways[self._way(given)](*given)

    def chosen(self) -> dict[str, str]:
        """For each shape that was timed: ``"plan"`` or ``"eager"``."""
        return dict(self._chosen)

    def _way(self, given: Given) -> str:
        """How to run what is given: see ``never_slower``."""
        if not self.never_slower or given.x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return PLAN
        told = given.describe()
        with self._lock:
            if told not in self._chosen:
                self._chosen[told] = fastest(self.unet, told, self._ways, given)
                for way in self._ways.keys() - set(self._chosen.values()):
                    self._ways[way].forget()  # its graphs hold memory
            return self._chosen[told]

    @torch.no_grad()
    def _eager(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], control: Sequence[Tensor]) -> Tensor:
        return self.unet.trunk(x, time_rows, contexts, control)

    def alone(self) -> Callable[..., Tensor]:
        """``plain`` for calls that run one after another, as in one graph: they share what kernels meet in."""
        made: dict[torch.device, Ops] = {}

        def run(*arguments: Any) -> Tensor:
            device = self.unet.conv_in.weight.device
            if device not in made:
                made[device] = in_turn(self.unet.ops, device)
            return self.plain(*arguments, ops=made[device])

        return run

    @torch.no_grad()
    def plain(
        self,
        x: Tensor,
        time_rows: Tensor,
        contexts: Sequence[TokenPair] = (),
        control: Sequence[Tensor] = (),
        ops: Ops | None = None,
    ) -> Tensor:
        """The same, its calls issued one by one: what others may capture."""
        keys = tuple(keys_of(i, k) for i, (k, _) in enumerate(contexts))
        shape = Shape(tuple(x.shape), tuple(time_rows.shape), keys, tuple(tuple(more.shape) for more in control))
        given = {"x": x, "rows": time_rows} | {f"control{i}": more for i, more in enumerate(control)}
        for i, (k, v) in enumerate(contexts):
            given |= {f"keys{i}": k, f"values{i}": v}
        return self._plan(shape).run(given, ops or self.unet.ops)

    def _plan(self, shape: Shape) -> FlatPlan:
        with self._lock:
            if shape not in self._plans:
                upcast = self.unet.config.upcast_attention
                self._plans[shape] = FlatPlan(lower(self.unet, shape), upcast=upcast)
                while len(self._plans) > PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(shape)
            return self._plans[shape]

    @torch.no_grad()
    def refresh(self, always: bool = False) -> None:
        """Follow parameters that were changed in place or replaced. Call it before a run, not at every step.

        What was changed in place needs no new capture; what lies elsewhere now does.

        Args:
            always: make all copies again, even where torch has counted no change (one through ``.data``, say).
        """
        parameters = list(self.unet.parameters())
        places = [p.data_ptr() for p in parameters]
        versions = [None if p.is_inference() else p._version for p in parameters]
        with self._lock:
            if places != self._places:
                self._plans.clear()
                for way in self._ways.values():
                    way.forget()
            elif always or versions != self._versions or None in versions:
                for plan in self._plans.values():
                    plan.refresh()
            self._places, self._versions = places, versions


class FlatNetwork(UNetNetwork):
    """A ``UNetNetwork`` whose trunk is a flat plan."""

    trunk: FlatTrunk

    def __init__(self, unet: UNet, never_slower: bool = False):
        super().__init__(unet, FlatTrunk(unet, never_slower))

    def plain(self) -> UNetNetwork:
        """The same network without a graph of its own, for one that captures more than an evaluation."""
        return UNetNetwork(self.unet, self.trunk.alone())

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``."""
        self.trunk.refresh()
        return super().prepare(cond, times)
