"""From a network and one table row to a denoised estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.sampling.table import C_IN, C_OUT, C_SKIP, CLIP, RowPlan

Prepared = Any  # made by a network's prepare(), read only by that network


class Cond(NamedTuple):
    """Conditioning of a batch; each part may be None."""

    label: Tensor | None = None  # [B] int64
    extra: dict[str, Tensor] | None = None  # keyword arguments of a network brought by the user, [B, ...] each

    def joined(self, other: Cond) -> Cond:
        """Join another conditioning behind this one, along the batch."""
        label = None if self.label is None or other.label is None else torch.cat([self.label, other.label])
        extra = (
            {k: torch.cat([v, other.extra[k]]) for k, v in self.extra.items()} if self.extra and other.extra else None
        )
        return Cond(label, extra)


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


class Denoiser(Protocol):
    """Network, table row and guidance together."""

    def __call__(
        self, x: Tensor, rows: Tensor, row_index: Tensor, plan: RowPlan, prepared: Prepared
    ) -> tuple[Tensor, Tensor]:
        """``x [B, C, H, W]``, ``rows [B, K]`` -> ``(D, D before clipping)``, each ``[B, C, H, W]`` float32."""


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

    def __call__(self, x: Tensor, row_index: Tensor, prepared: CallableNetwork.Times) -> Tensor:
        """See ``Network.__call__``."""
        batch = x.shape[0]
        place = prepared.places[:batch] if prepared.times.shape[0] > 1 else 0
        told = prepared.times[place, row_index]
        keywords = {name: value[:batch] for name, value in prepared.keywords.items()}
        if self.two_time:
            return self.fn(x, told[:, 0], told[:, 1], **keywords)
        return self.fn(x, told[:, 0], **keywords)


def column(rows: Tensor, index: int) -> Tensor:
    """One column of ``rows [B, K]``, ready to multiply images: ``[B, 1, 1, 1]``."""
    return rows[:, index].view(-1, 1, 1, 1)


def estimate(x: Tensor, output: Tensor, rows: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """Turn raw outputs into ``(D, D before clipping)``."""
    raw = column(rows, C_SKIP) * x + column(rows, C_OUT) * output
    if not plan.clipped:
        return raw, raw
    bound = column(rows, CLIP)
    return torch.maximum(torch.minimum(raw, bound), -bound), raw


class NetworkDenoiser:
    """The plain denoiser: one network call for each image."""

    def __init__(self, network: Network):
        self.network = network

    def __call__(
        self, x: Tensor, rows: Tensor, row_index: Tensor, plan: RowPlan, prepared: Prepared
    ) -> tuple[Tensor, Tensor]:
        """See ``Denoiser``."""
        output = self.network(column(rows, C_IN) * x, row_index, prepared)
        return estimate(x, output, rows, plan)
