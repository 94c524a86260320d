# GEGLU, forward: the halves of one packed projection, y = value * gelu(gate) with the exact (erf) GELU.
#
# Shapes   x [T, 2 * I] (value, then gate), any stride between rows, y [T, I] contiguous, fp32, fp16 or bf16.
# Grid     (ceil(T / ROWS) * ceil(I / LANES)): a program writes ROWS x LANES results.
# Passes   one.
# Bytes    3 * T*I * itemsize; time >= bytes / bandwidth.
# Limits   float32 inside; no atomics; bits do not depend on the batch. No backward.
# Twin     reference.geglu
"""The gate of a feed-forward network in Triton. The specification is ``fastdiff.kernels.reference.geglu``."""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import ShapeError

from .edge import DTYPES, check_like, chip_of
from .tiles import RowTile, lookup


@triton.jit
def _geglu_kernel(x, y, T, INNER, stride, blocks, ROWS: tl.constexpr, LANES: tl.constexpr):
    token = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    lane = (tl.program_id(0) % blocks) * LANES + tl.arange(0, LANES)
    inside = (token < T)[:, None] & (lane < INNER)[None, :]
    token = token.to(tl.int64)[:, None]
    source = x + token * stride + lane[None, :]
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + INNER, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + token * INNER + lane[None, :], value * gelu, mask=inside)


INTERPRETED = not isinstance(_geglu_kernel, triton.JITFunction)


def geglu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The first half of the last dimension times the GELU of the second.

    Args:
        x: ``[..., 2 * I]``, not empty; rows at one distance from each other are read in place, others are copied first.
        out: ``[..., I]`` in the dtype of ``x``, or None; written and returned.

    Returns:
        ``[..., I]`` in the dtype of ``x``.

    Raises:
        ShapeError: if a shape or dtype does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6; the exact GELU of Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if x.dim() < 2 or x.numel() == 0 or x.shape[-1] % 2 or x.dtype not in DTYPES:
        allowed = f"[..., 2 * I], not empty, in {', '.join(map(str, DTYPES))}"
        raise ShapeError(f"geglu: x {tuple(x.shape)} {x.dtype}; allowed: {allowed}")
    inner = x.shape[-1] // 2
    check_like("geglu", "out", out, x[..., :inner])
    chip = chip_of("geglu", (x,) if out is None else (x, out), interpreted=INTERPRETED)
    tile = cast(RowTile, lookup("geglu", "any", x.dtype, chip.architecture))
    lanes = min(tile.lanes, triton.next_power_of_2(inner))
    rows, blocks = max(1, tile.elements // lanes), triton.cdiv(inner, lanes)
    y = out if out is not None and out.is_contiguous() else x.new_empty(*x.shape[:-1], inner)
    flat = x.flatten(0, -2)  # a view where the rows lie at one distance
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    with torch.cuda.device_of(x):
        _geglu_kernel[(triton.cdiv(len(flat), rows) * blocks,)](
            flat, y, len(flat), inner, flat.stride(0), blocks,
            ROWS=rows, LANES=lanes, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y if out is None or y is out else out.copy_(y)
