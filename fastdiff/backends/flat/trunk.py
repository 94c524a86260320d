"""``UNet.trunk`` as a flat plan for each shape that it meets, on a GPU captured in a graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.eager import Prepared, UNetNetwork
from fastdiff.backends.flat.choose import EAGER, PLAN, fastest
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
    control: tuple[Tensor, ...] = ()

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
        # taken in this order, with a graph's own lock between them: capturing makes a plan, choosing captures
        self._choosing, self._lock = threading.Lock(), threading.Lock()
        self._ways = {PLAN: Captured(self.alone()), EAGER: Captured(self._eager)}
        self._cut = {PLAN: Captured(self.alone(self.plain_cut)), EAGER: Captured(self._eager_cut)}
        self.graphs = [*self._ways.values(), *self._cut.values()]  # all that read the weights where they lie
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

    def parted(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], branch: int) -> tuple[Tensor, Tensor]:
        """See ``UNet.parted``."""
        out, deep = self._cut[self._way(Given(x, time_rows, tuple(contexts)))](x, time_rows, tuple(contexts), branch)
        return out, deep

    def shallow(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], branch: int, deep: Tensor) -> Tensor:
        """See ``UNet.shallow``."""
        given = Given(x, time_rows, tuple(contexts))
        return self._cut[self._way(given)](x, time_rows, tuple(contexts), branch, deep)[0]

    def chosen(self) -> dict[str, str]:
        """For each shape that was timed: ``"plan"`` or ``"eager"``."""
        return dict(self._chosen)

    def _way(self, given: Given) -> str:
        """How to run what is given: see ``never_slower``."""
        if not self.never_slower or given.x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return PLAN
        told = given.describe()
        with self._choosing:
            if told not in self._chosen:
                self._chosen[told] = fastest(self.unet, told, self._ways, given)
                for way in self._ways.keys() - set(self._chosen.values()):
                    self._ways[way].forget()  # its graphs hold memory
                    self._cut[way].forget()
            return self._chosen[told]

    @torch.no_grad()
    def _eager(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], control: Sequence[Tensor]) -> Tensor:
        return self.unet.trunk(x, time_rows, contexts, control)

    @torch.no_grad()
    def _eager_cut(
        self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], branch: int, deep: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if deep is None:
            return self.unet.parted(x, time_rows, contexts, branch)
        return (self.unet.shallow(x, time_rows, contexts, branch, deep),)

    def alone(self, plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """``plain`` for calls that run one after another, as in one graph: they share what kernels meet in."""
        made: dict[torch.device, Ops] = {}
        issued = plain or self.plain

        def run(*arguments: Any) -> Any:
            device = self.unet.conv_in.weight.device
            if device not in made:
                made[device] = in_turn(self.unet.ops, device)
            return issued(*arguments, ops=made[device])

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
        shape, given = _laid_out(x, time_rows, contexts)
        given |= {f"control{i}": more for i, more in enumerate(control)}
        shape = shape._replace(control=tuple(tuple(more.shape) for more in control))
        return self._plan(shape).run(given, ops or self.unet.ops)["out"]

    @torch.no_grad()
    def plain_cut(
        self,
        x: Tensor,
        time_rows: Tensor,
        contexts: Sequence[TokenPair],
        branch: int,
        deep: Tensor | None = None,
        ops: Ops | None = None,
    ) -> tuple[Tensor, ...]:
        """``plain`` of ``parted``, with ``deep`` of ``shallow``: the output, and the deep features that it made."""
        shape, given = _laid_out(x, time_rows, contexts)
        if deep is not None:
            given["deep"] = deep
        shape = shape._replace(branch=branch, deep=None if deep is None else tuple(deep.shape))
        return tuple(self._plan(shape).run(given, ops or self.unet.ops).values())

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
            moved, changed = places != self._places, versions != self._versions or None in versions
            if not moved and (always or changed):
                for plan in self._plans.values():
                    plan.refresh()
            self._places, self._versions = places, versions
        if moved:
            self.forget()

    def forget(self) -> None:
        """Drop plans and graphs: they read the weights where these lie no more, or their memory is wanted."""
        with self._lock:
            self._plans.clear()
        for graph in self.graphs:
            graph.forget()


def _laid_out(x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair]) -> tuple[Shape, dict[str, Tensor]]:
    """What a call brings, by the names of a program's externals, and its shape."""
    keys = tuple(keys_of(i, k) for i, (k, _) in enumerate(contexts))
    given = {"x": x, "rows": time_rows}
    for i, (k, v) in enumerate(contexts):
        given |= {f"keys{i}": k, f"values{i}": v}
    return Shape(tuple(x.shape), tuple(time_rows.shape), keys), given


class FlatNetwork(UNetNetwork):
    """A ``UNetNetwork`` whose trunk is a flat plan."""

    trunk: FlatTrunk

    def __init__(self, unet: UNet, never_slower: bool = False):
        trunk = FlatTrunk(unet, never_slower)
        super().__init__(unet, trunk, trunk.parted, trunk.shallow)

    def plain(self) -> UNetNetwork:
        """The same network without a graph of its own, for one that captures more than an evaluation."""
        cut = self.trunk.alone(self.trunk.plain_cut)
        return UNetNetwork(self.unet, self.trunk.alone(), cut, lambda *arguments: cut(*arguments)[0])

    def forget(self) -> None:
        """See ``UNetNetwork.forget``."""
        self.trunk.forget()

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``."""
        self.trunk.refresh()
        return super().prepare(cond, times)
