# What follows a layer: its bias and a residual, in one pass.
#
# Shapes   x, residual, out [B, H, W, C] fp32, fp16 or bf16, dense channels, any distance between pixels; bias [C].
# Grid     (ceil(B*H*W / ROWS), ceil(C / BLOCK_C)).
# Passes   one: x and the residual are read once, out written once; sums in float32, rounded once.
# Bytes    B*H*W*C * itemsize * (2 or 3); time >= bytes / bandwidth.
# Limits   no backward. An image's bits do not depend on its batch: every element is a sum of its own.
# Twin     reference.add
"""Fused addition in Triton. The specification is ``fastdiff.kernels.reference.add``."""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import ShapeError

from .edge import DTYPES, chip_of, pixel_stride
from .tiles import CombineTile, lookup

WIDEST = 256  # channels of one tile


@triton.jit
def _add_kernel(
    x, bias, residual, out, pixels, C, x_pixel, bias_c, residual_pixel, out_pixel,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    total = tl.load(x + pixel[:, None] * x_pixel + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + channel * bias_c, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        place = pixel[:, None] * residual_pixel + channel[None, :]
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pixel[:, None] * out_pixel + channel[None, :], total, mask=inside)


INTERPRETED = not isinstance(_add_kernel, triton.JITFunction)


def _pixel_stride(name: str, value: Tensor) -> int:
    """Elements from one pixel of ``[B, H, W, C]`` to the next."""
    pixel = pixel_stride(value)
    if pixel is None:
        raise ShapeError(f"add: {name} has strides {value.stride()}; allowed: pixels side by side, channels dense")
    return pixel


def _check(x: Tensor, given: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ShapeError(f"add: x {tuple(x.shape)} {x.dtype}; allowed: [B, H, W, C] in {', '.join(map(str, DTYPES))}")
    for name, (value, shape) in given.items():
        if value is not None and (tuple(value.shape) != shape or value.dtype != x.dtype):
            raise ShapeError(f"add: {name} {tuple(value.shape)} {value.dtype}; allowed: {shape} {x.dtype}")


def add(x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None = None) -> Tensor:
    """What follows a layer, in one pass.

    Args:
        x: ``[B, H, W, C]``.
        bias: ``[C]`` or None.
        residual: ``[B, H, W, C]``, any distance between pixels, or None.
        out: where to write, likewise, or None for a new dense tensor.

    Returns:
        ``out``, or the new tensor, in the dtype of ``x``.

    Raises:
        ShapeError: if a shape, dtype or layout does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.
    """
    batch, height, width, channels = size = tuple(x.shape) if x.dim() == 4 else (0, 0, 0, 0)
    _check(x, {"bias": (bias, (channels,)), "residual": (residual, size), "out": (out, size)})
    chip = chip_of("add", tuple(t for t in (x, bias, residual, out) if t is not None), interpreted=INTERPRETED)
    x = x if x.stride(3) == 1 else x.contiguous()
    if out is None:
        out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    tile = cast(CombineTile, lookup("add", "any", x.dtype, chip.architecture))
    lanes = min(WIDEST, triton.next_power_of_2(channels))
    rows, pixels = max(1, tile.elements // lanes), batch * height * width
    strides = [
        _pixel_stride(name, t) if t is not None else 0 for name, t in (("x", x), ("residual", residual), ("out", out))
    ]
    with torch.cuda.device_of(x):
        _add_kernel[(triton.cdiv(pixels, rows), triton.cdiv(channels, lanes))](
            x, bias, residual, out, pixels, channels, strides[0], 0 if bias is None else bias.stride(0), *strides[1:],
            ROWS=rows, BLOCK_C=lanes, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
