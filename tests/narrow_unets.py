"""Published layouts with narrow blocks, and something to run them on."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.benchmarks.gpu.memory import Sizes, sizes
from fastdiff.benchmarks.layouts import LAYOUTS, SD15, SDXL, scaled
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet


def network(layout: str = "SD 1.5", divisor: int = 8) -> UNet:
    """A published layout with narrow blocks and random weights, norms and biases included."""
    unet = UNet(UNetConfig.from_dict(scaled(LAYOUTS[layout], divisor))).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0, 0.1)
    return unet.to(memory_format=torch.channels_last)


def inputs(unet: UNet, batch: int, height: int, width: int, tokens: int = 7) -> tuple[Tensor, Tensor, list]:
    """Arguments of ``trunk``."""
    rows = unet.row_width()
    contexts = []
    if unet.config.conditional:
        contexts = unet.contexts(torch.randn(batch, tokens, unet.config.cross_attention_dim))
    return torch.randn(batch, unet.config.in_channels, height, width), torch.randn(batch, rows), contexts


def first(given: tuple[Tensor, Tensor, list], count: int = 1) -> tuple[Tensor, Tensor, list]:
    """Those of the first images alone."""
    x, rows, contexts = given
    return x[:count], rows[:count], [(k[:count], v[:count]) for k, v in contexts]


def error(got: Tensor, exact: Tensor) -> float:
    """Relative, as root mean square."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def narrow_sizes(name: str) -> Sizes:
    """A text-to-image model of the GPU suite, for 128 pixels."""
    unet = scaled(SDXL if name == "sdxl" else SD15, 8) | {"sample_size": 16}
    found = sizes(name)
    return found._replace(unet=unet, vae=found.vae | {"block_out_channels": [32, 32, 32, 32], "sample_size": 128})
