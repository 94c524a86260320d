"""Somebody's own network, of a design fastdiff does not know: the MNIST UNet of github.com/BrianPulfer's DDPM (MIT)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ForeignUNet(nn.Module):
    """``fn(x [N, 1, 28, 28], timestep [N])`` -> the noise. Parameters are looked up by their published names.

    Time is a stored table of 1000 rows, indexed by whole timesteps. A stage adds a vector of time to each channel of
    its input, then runs three blocks: layer norm over the whole image, two convolutions with SiLU, no residual.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.tensors = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], stride, padding)

    def _up(self, x: Tensor, name: str, stride: int = 2, padding: int = 1) -> Tensor:
        return F.conv_transpose2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], stride, padding)

    def _stage(self, x: Tensor, time: Tensor, name: str, embedding: str) -> Tensor:
        vector = self._linear(F.silu(self._linear(time, f"{embedding}.0")), f"{embedding}.2")
        x = x + vector[:, :, None, None]
        for i in range(3):
            if (name, i) != ("b_out", 2):  # whose norm is stored but not applied
                weight, bias = (self.tensors[f"{name}.{i}.ln.{part}"] for part in ("weight", "bias"))
                x = F.layer_norm(x, weight.shape, weight, bias)
            x = F.silu(self._conv(F.silu(self._conv(x, f"{name}.{i}.conv1")), f"{name}.{i}.conv2"))
        return x

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = self.tensors["time_embed.weight"][timestep.round().long()]
        wide = self._stage(x, time, "b1", "te1")
        half = self._stage(self._conv(wide, "down1", 2), time, "b2", "te2")
        quarter = self._stage(self._conv(half, "down2", 2), time, "b3", "te3")
        deep = self._conv(F.silu(self._conv(quarter, "down3.0", 1, 0)), "down3.2", 2)
        deep = self._stage(deep, time, "b_mid", "te_mid")
        up = self._up(F.silu(self._up(deep, "up1.0")), "up1.2", 1, 0)
        up = self._stage(torch.cat([quarter, up], 1), time, "b4", "te4")
        up = self._stage(torch.cat([half, self._up(up, "up2")], 1), time, "b5", "te5")
        up = self._stage(torch.cat([wide, self._up(up, "up3")], 1), time, "b_out", "te_out")
        return self._conv(up, "conv_out")
