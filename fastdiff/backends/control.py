"""A UNet steered by ControlNets, as one network for the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.eager import TOKENS, Prepared, UNetNetwork, prepare
from fastdiff.errors import PlanError
from fastdiff.models.controlnet import ControlNet
from fastdiff.sampling.denoiser import Cond


class Control(NamedTuple):
    """One ControlNet, what it is shown, and how strongly and when it steers."""

    net: ControlNet
    picture: Tensor  # [B, 3, 8H, 8W] in [0, 1]
    scale: float = 1.0
    start: float = 0.0  # share of the steps before which it does nothing
    end: float = 1.0  # share of the steps after which it does nothing

    def scales(self, rows: int) -> list[float]:
        """Its strength at each row."""
        return [self.scale * (i / rows >= self.start and (i + 1) / rows <= self.end) for i in range(rows)]


class Hinted(NamedTuple):
    """What one ControlNet prepared."""

    prepared: Prepared
    hint: Tensor  # [places, C, H, W]
    scales: Tensor  # [R]


class Steered(NamedTuple):
    """Prepared: the UNet's part and one for each ControlNet."""

    unet: Prepared
    hints: tuple[Hinted, ...]


class ControlledNetwork:
    """The UNet, and ControlNets whose residuals are added up.

    Args:
        network: the UNet, in torch.
        controls: what steers it; their pictures belong to the images of a batch, guided or not.
    """

    def __init__(self, network: UNetNetwork, controls: Sequence[Control]):
        self.network, self.controls = network, tuple(controls)

    def prepare(self, cond: Cond, times: Tensor) -> Steered:
        """See ``Network.prepare``."""
        extra = {name: value for name, value in (cond.extra or {}).items() if name != "concat"}
        hints = []
        for control in self.controls:
            dtype = control.net.conv_in.weight.dtype
            hint = control.net.hint(control.picture.to(times.device, dtype))
            places = len(extra[TOKENS]) if TOKENS in extra else len(hint)
            if places % len(hint):
                raise PlanError(f"{len(hint)} control pictures for {places} images; allowed: one for each image")
            scales = torch.tensor(control.scales(times.shape[1]), device=times.device)
            prepared = prepare(control.net, Cond(cond.label, extra), times)
            hints.append(Hinted(prepared, hint.repeat(places // len(hint), 1, 1, 1), scales))
        return Steered(self.network.prepare(cond, times), tuple(hints))

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Steered) -> Tensor:
        """See ``Network.__call__``."""
        total: list[Tensor] = []
        for control, hinted in zip(self.controls, prepared.hints, strict=True):
            seen = x.to(control.net.conv_in.weight.dtype, memory_format=torch.channels_last)
            found = control.net.trunk(seen, *hinted.prepared.at(row_index), hinted.hint[: x.shape[0]])
            scale = hinted.scales[row_index].view(-1, 1, 1, 1).to(seen.dtype)
            scaled = [scale * residual for residual in found]
            total = scaled if not total else [one + more for one, more in zip(total, scaled, strict=True)]
        return self.network(x, row_index, prepared.unet, total)
