"""From a network and one table row to a denoised estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from fastdiff.errors import PlanError, ShapeError
from fastdiff.sampling.clipping import clipped, thresholded
from fastdiff.sampling.guidance import Guided, optimal_scale, projected, rescaled
from fastdiff.sampling.table import (
    CLIP,
    GUIDANCE,
    LEARNED,
    MOMENTUM,
    NORM,
    OPTIMAL,
    PARALLEL,
    PROJECTED,
    RESCALE,
    TAIL,
    WEAK_NOISE,
    Deep,
    RowPlan,
    Rows,
)

Prepared = Any  # made by a network's prepare(), read only by that network


class Place(NamedTuple):
    """One place of what a network prepared, at one row."""

    prepared: Prepared
    place: int
    row: int


class Cond(NamedTuple):
    """Conditioning of a batch; each part may be None."""

    label: Tensor | None = None  # [B] int64
    extra: dict[str, Tensor] | None = None  # keyword arguments of a network brought by the user, [B, ...] each

    def parts(self) -> dict[str, Tensor]:
        """What is given, by name."""
        return dict(self.extra or {}) | ({} if self.label is None else {"label": self.label})

    def joined(self, other: Cond) -> Cond:
        """Join another conditioning behind this one, along the batch.

        Raises:
            PlanError: if one holds a part that the other lacks.
        """
        lonely = sorted(self.parts().keys() ^ other.parts().keys())
        if lonely:
            raise PlanError(f"cond and uncond must hold the same parts; only one of them has {', '.join(lonely)}")
        both = {name: torch.cat([part, other.parts()[name]]) for name, part in self.parts().items()}
        return Cond(both.pop("label", None), both or None)

    def check(self, name: str, batch: int) -> None:
        """Raise ``ShapeError`` unless every part is for ``batch`` images."""
        for part, value in self.parts().items():
            if value.dim() == 0 or value.shape[0] != batch:
                raise ShapeError(f"{name}: {part} is {tuple(value.shape)}; needed: {batch} images first")


class Network(Protocol):
    """What the loop needs of a network. Image ``i`` of a call reads place ``i`` of ``prepared``."""

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """Compute once what does not change between steps.

        Args:
            cond: conditioning of every place.
            times: ``[1 or places, R, 2]``: what the network is told at each row (time, target time).
        """

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared) -> Tensor:
        """``x [B, C, H, W]``, ``row_index [B]`` int64 -> raw output ``[B, C, H, W]`` (float32)."""


@runtime_checkable
class Gathering(Protocol):
    """A network whose batches may be put together from several runs: what an engine needs."""

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``."""

    def gather(self, places: Sequence[Place]) -> Prepared:
        """What was prepared for places of different runs, as one batch of one row: every image stands at row 0."""

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared) -> Tensor:
        """See ``Network.__call__``."""


@runtime_checkable
class Caching(Protocol):
    """A network whose deep layers may be left out at some steps: what step caching needs."""

    branches: int  # its skip connections, which may be cut at

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``."""

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared) -> Tensor:
        """See ``Network.__call__``."""

    def parted(self, x: Tensor, row_index: Tensor, prepared: Prepared, branch: int) -> tuple[Tensor, Tensor]:
        """The same, and the features that join skip connection ``branch`` from below: ``[B, ...]``."""

    def shallow(self, x: Tensor, row_index: Tensor, prepared: Prepared, branch: int, deep: Tensor) -> Tensor:
        """The output of the layers above that skip connection, with such features of an earlier call."""


class Estimates(NamedTuple):
    """What one evaluation gives each image, ``[B, C, H, W]`` float32 each."""

    denoised: Tensor  # D after guidance and clipping
    raw: Tensor  # D before clipping, or the weak estimate where the rule wants the noise from that
    momentum: Tensor | None  # the register of APG
    spread: Tensor | None = None  # what the network multiplies the noise n1 by, where a row lets it
    deep: Tensor | None = None  # features for rows to come, where the plan keeps or reads them


class Denoiser(Protocol):
    """Network, table row and guidance together."""

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        plan: RowPlan,
        prepared: Prepared,
        momentum: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> Estimates:
        """``x [B, C, H, W]`` and one row for each image -> estimates.

        ``momentum`` is the register, if declared; ``deep`` what an earlier row kept, if the plan reads it.
        """


class CallableNetwork:
    """Any function as a network: ``fn(x, timestep)``, or ``fn(x, timestep, target)`` for two-time networks.

    Args:
        fn: gets ``x [B, C, H, W]``, ``timestep [B]`` (and ``target [B]``), and the conditioning as keywords.
        two_time: does it take the target time?
        label_name: keyword under which it takes class labels, as diffusers names it.
    """

    class Times(NamedTuple):
        """Prepared: the table's times and the conditioning, by place."""

        times: Tensor  # [1 or places, R, 2]
        places: Tensor  # [places]
        keywords: dict[str, Tensor]

    def __init__(self, fn: Callable[..., Tensor], two_time: bool = False, label_name: str = "class_labels"):
        self.fn, self.two_time, self.label_name = fn, two_time, label_name

    def prepare(self, cond: Cond, times: Tensor) -> CallableNetwork.Times:
        """See ``Network.prepare``."""
        keywords = dict(cond.extra or {}) | ({} if cond.label is None else {self.label_name: cond.label})
        return self.Times(times, torch.arange(times.shape[0], device=times.device), keywords)

    def gather(self, places: Sequence[Place]) -> CallableNetwork.Times:
        """See ``Gathering.gather``."""
        told, keywords = [], {name: [] for name in places[0].prepared.keywords}
        for prepared, place, row in places:
            told.append(prepared.times[place if prepared.times.shape[0] > 1 else 0, row : row + 1])
            for name, value in prepared.keywords.items():
                keywords[name].append(value[place : place + 1])
        index = torch.arange(len(places), device=told[0].device)
        return self.Times(torch.stack(told), index, {name: torch.cat(values) for name, values in keywords.items()})

    def __call__(self, x: Tensor, row_index: Tensor, prepared: CallableNetwork.Times) -> Tensor:
        """See ``Network.__call__``."""
        batch = x.shape[0]
        place = prepared.places[:batch] if prepared.times.shape[0] > 1 else 0
        told = prepared.times[place, row_index]
        keywords = {name: value[:batch] for name, value in prepared.keywords.items()}
        if self.two_time:
            return self.fn(x, told[:, 0], told[:, 1], **keywords)
        return self.fn(x, told[:, 0], **keywords)


class NetworkDenoiser:
    """The denoiser of every run. Rows at which no image is guided run the strong half alone.

    Without a ``guide``, ``prepared`` holds the strong places of the batch first, then the weak ones, and a guided row
    is one call of the network on both. With one, ``prepared`` is a pair, what each network prepared for the batch.

    Args:
        network: gives the strong estimate.
        guide: another network of the same path and prediction that gives the weak one (autoguidance).

    Source of the second network: Karras et al. 2024, arXiv:2406.02070, eq. 2.
    """

    def __init__(self, network: Network, guide: Network | None = None):
        self.network, self.guide = network, guide

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        plan: RowPlan,
        prepared: Prepared,
        momentum: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> Estimates:
        """See ``Denoiser``."""
        if plan.guided is None:
            own = prepared if self.guide is None else prepared[0]
            if not plan.asks:
                raw = rows.c_skip * x
                return Estimates(clip(raw, rows, plan), raw, momentum, None, deep)
            whole, deep = self._asked(rows.c_in * x, rows.row_index, own, plan.deep, deep)
            output, spread = part(x, whole, rows, plan)
            raw = estimate(x, output, rows)
            return Estimates(clip(raw, rows, plan), raw, momentum, spread, deep)
        strong, weak, deep = self._both(rows.c_in * x, rows.row_index, prepared, plan.deep, deep)
        strong, spread = part(x, strong, rows, plan)
        guided, raw, momentum = mix(x, strong, weak[:, : x.shape[1]], rows, plan.guided, momentum)
        return Estimates(clip(guided, rows, plan), raw, momentum, spread, deep)

    def _both(
        self, scaled: Tensor, row_index: Tensor, prepared: Prepared, cut: Deep | None, deep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.guide is not None:
            return self.network(scaled, row_index, prepared[0]), self.guide(scaled, row_index, prepared[1]), None
        twice = torch.cat([scaled, scaled]), torch.cat([row_index, row_index])
        both, deep = self._asked(*twice, prepared, cut, deep)
        batch = scaled.shape[0]
        return both[:batch], both[batch:], deep  # chunk(2) would fix the batch of an exported graph

    def _asked(
        self, scaled: Tensor, row_index: Tensor, prepared: Prepared, cut: Deep | None, deep: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output, and the deep features for the rows to come."""
        if cut is None:
            return self.network(scaled, row_index, prepared), None
        network = cast(Caching, self.network)  # ``step_cache.planned`` sees to it
        if not cut.reads:
            return network.parted(scaled, row_index, prepared, cut.branch)
        assert deep is not None
        # the strong places come first: a row without guidance reads those alone
        return network.shallow(scaled, row_index, prepared, cut.branch, deep[: len(scaled)]), deep


def column(values: Tensor, index: int) -> Tensor:
    """One column of ``values [B, K]``, ready to multiply images: ``[B, 1, 1, 1]``."""
    return values[:, index].view(-1, 1, 1, 1)


def part(x: Tensor, output: Tensor, rows: Rows, plan: RowPlan) -> tuple[Tensor, Tensor | None]:
    """Part the output of a network that also predicts a variance, ``[B, 2C, H, W]``; others pass.

    Returns:
        The prediction ``[B, C, H, W]``, and the factor of the noise n1 where the plan wants it.

    Raises:
        PlanError: if the plan wants a variance and the network gives none.
    """
    channels = x.shape[1]
    if plan.learned and output.shape[1] != 2 * channels:
        raise PlanError(
            f"the network returns {output.shape[1]} channels for {channels}; a learned variance needs {2 * channels}: "
            "use variance 'fixed_small' or 'fixed_large'"
        )
    if output.shape[1] != 2 * channels:
        return output, None
    spread = torch.exp(column(rows.values, LEARNED) * (1 + output[:, channels:])) if plan.learned else None
    return output[:, :channels], spread


def estimate(x: Tensor, output: Tensor, rows: Rows) -> Tensor:
    """Turn raw outputs into estimates of x0, before clipping."""
    return rows.c_skip * x + rows.c_out * output


def clip(raw: Tensor, rows: Rows, plan: RowPlan) -> Tensor:
    """Keep estimates inside the range of the data, if any image of the batch is to be."""
    if not plan.clipped:
        return raw
    bound = column(rows.values, CLIP)
    if plan.tail is None:
        return clipped(raw, bound)
    return thresholded(raw, bound, column(rows.values, TAIL), plan.tail)


def mix(
    x: Tensor, strong: Tensor, weak: Tensor, rows: Rows, wanted: Guided, momentum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mix two outputs ``[B, C, H, W]`` into ``(D, what the register raw gets, momentum)``.

    D is affine in the network's output with coefficients that both share, so outputs are mixed and D is formed once;
    only APG compares estimates. An image whose numbers do not ask for a formula is left as it is, bit for bit.
    """
    values = rows.values
    scale = column(values, GUIDANCE)
    if wanted.optimal:
        weak = weak * torch.where(column(values, OPTIMAL) != 0, optimal_scale(strong, weak), 1)
    mixed = torch.lerp(weak, strong, scale)
    if wanted.rescaled:
        mixed = rescaled(mixed, strong, column(values, RESCALE))
    denoised = estimate(x, mixed, rows)
    if wanted.projected:
        chosen = column(values, PROJECTED) != 0
        difference = rows.c_out * (strong - weak)
        if wanted.momentum:
            assert momentum is not None  # State.start declares it
            difference = difference + column(values, MOMENTUM) * momentum
            momentum = torch.where(chosen, difference, momentum)
        conditional = estimate(x, strong, rows)
        update = projected(difference, conditional, column(values, NORM), column(values, PARALLEL))
        denoised = torch.where(chosen, conditional + (scale - 1) * update, denoised)
    raw = denoised
    if wanted.weak_noise:
        raw = torch.where(column(values, WEAK_NOISE) != 0, estimate(x, weak, rows), denoised)
    return denoised, raw, momentum
