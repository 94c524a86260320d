"""ControlNet: a copy of the UNet's way down that reads a picture and gives residuals for the UNet to add.

Parameter names are those of diffusers' ``ControlNetModel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models.config import CONDITIONAL, UNetConfig
from fastdiff.models.unet import Encoder, TokenPair

NAME = "ControlNetModel"
ORDERS = ("rgb", "bgr")


@dataclass(frozen=True)
class ControlNetConfig:
    """The sizes of a ControlNet: those of the UNet it was copied from, and of what reads the picture."""

    unet: UNetConfig
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ControlNetConfig:
        """Read a ``config.json``.

        Raises:
            ArtifactError: naming the first key whose value is unknown, damaged or not supported.
        """
        if config.get("_class_name", NAME) != NAME:
            raise ArtifactError(f"config.json: _class_name is {config['_class_name']!r}; supported: {NAME!r}")
        rest = {key: value for key, value in config.items() if not key.startswith("_")}
        if rest.pop("global_pool_conditions", False) is not False:
            raise ArtifactError(
                f"config.json: global_pool_conditions is {config['global_pool_conditions']!r}; supported: False"
            )
        sizes = rest.pop("conditioning_embedding_out_channels", (16, 32, 96, 256))
        channels = rest.pop("conditioning_channels", 3)
        order = rest.pop("controlnet_conditioning_channel_order", "rgb")
        down = rest.get("down_block_types", UNetConfig.from_dict({"_class_name": CONDITIONAL}).down_block_types)
        # the copy has no way up, which a UNet's config cannot leave out
        up = ["UpBlock2D"] * len(down) if isinstance(down, list | tuple) else down
        unet = UNetConfig.from_dict({**rest, "_class_name": CONDITIONAL, "up_block_types": up})
        listed = isinstance(sizes, list | tuple) and 1 <= len(sizes) <= 8
        if not listed or not all(isinstance(size, int) and 1 <= size <= 4096 for size in sizes):
            raise ArtifactError(
                f"config.json: conditioning_embedding_out_channels is {sizes!r}; allowed: 1 to 8 sizes from 1 to 4096"
            )
        if not isinstance(channels, int) or not 1 <= channels <= 64:
            raise ArtifactError(f"config.json: conditioning_channels is {channels!r}; allowed: 1 to 64")
        if order not in ORDERS:
            raise ArtifactError(f"config.json: controlnet_conditioning_channel_order is {order!r}; allowed: {ORDERS}")
        return cls(unet, channels, tuple(sizes), order)


class PictureEmbedding(nn.Module):
    """Convolutions from a picture to the features of the latent size, halved once for each pair of ``blocks``."""

    def __init__(self, channels: int, sizes: Sequence[int], out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, sizes[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for here, there in zip(sizes, sizes[1:], strict=False):
            self.blocks.append(nn.Conv2d(here, here, 3, padding=1))
            self.blocks.append(nn.Conv2d(here, there, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(sizes[-1], out, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """``[B, C, 8H, 8W] -> [B, C', H, W]`` (with four sizes)."""
        x = F.silu(self.conv_in(picture))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """diffusers' ``ControlNetModel``.

    Source: Zhang et al. 2023, arXiv:2302.05543, sec. 3.
    """

    def __init__(self, config: ControlNetConfig, ops: Ops = REFERENCE):
        super().__init__(config.unet, None, ops)
        first, deepest = config.unet.block_out_channels[0], config.unet.block_out_channels[-1]
        sizes = config.conditioning_embedding_out_channels
        self.flips = config.controlnet_conditioning_channel_order == "bgr"
        self.controlnet_cond_embedding = PictureEmbedding(config.conditioning_channels, sizes, first)
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(size, size, 1) for size in self.skips)
        self.controlnet_mid_block = nn.Conv2d(deepest, deepest, 1)

    def hint(self, picture: Tensor) -> Tensor:
        """Embed the picture ``[B, 3, 8H, 8W]`` in [0, 1], once for a whole run: ``[B, C, H, W]``."""
        return self.controlnet_cond_embedding(picture.flip(1) if self.flips else picture)

    def trunk(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], hint: Tensor) -> list[Tensor]:
        """The part that runs at every step.

        Args:
            x: ``[B, C, H, W]``, what the UNet is given.
            time_rows: ``[B, P]``, of ``time_rows``.
            contexts: of ``contexts``.
            hint: of ``hint``.

        Returns:
            The residuals for ``UNet.trunk``, unscaled.
        """
        rows = self.split_rows(time_rows)
        x, skips = self.encode(self.conv_in(x) + hint, rows, iter(contexts))
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*down, self.controlnet_mid_block(x)]
