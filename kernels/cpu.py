"""Ops for CPUs in torch's own calls. The specification is ``fastdiff.kernels.reference``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``reference.linear`` by oneDNN's own product. It knows float32 and no gradients; all else goes the usual way."""
    if _LINEAR is None or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _LINEAR(x, weight, bias, "none", [], "")


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """``reference.upsample_conv``; where the size doubles, as four 2x2 convolutions of the small image.

    Each of the four pixels that a pixel becomes sees only two rows and two columns of the small image, so the nine
    weights add up to four: 16 products in place of 36.
    """
    height, width = x.shape[2:]
    if tuple(size) != (2 * height, 2 * width):
        return reference.upsample_conv(x, weight, bias, size)
    padded = F.pad(x, (1, 1, 1, 1))
    out = x.new_empty(x.shape[0], 2 * height, 2 * width, weight.shape[0])
    for a, rows in enumerate(_halves(weight, 2)):
        for b, kernel in enumerate(_halves(rows, 3)):
            window = padded[:, :, a : a + height + 1, b : b + width + 1].contiguous(memory_format=torch.channels_last)
            part = F.conv2d(window, kernel.contiguous(memory_format=torch.channels_last), bias)
            out[:, a::2, b::2] = part.permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2)


def _halves(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three weights along an axis, summed to two: for even pixels, which lie behind their source, and for odd ones."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


def _onednn_linear() -> object | None:
    try:
        return torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
    except (AttributeError, RuntimeError):
        return None


_LINEAR = _onednn_linear()
