# LayerNorm, forward, over the last dimension; optionally of x + residual.
#
# Shapes   x, y, residual, total [T, C] contiguous, fp32, fp16 or bf16; weight, bias [C] or None.
# Grid     (ceil(T / ROWS)): a program holds ROWS whole rows, BLOCK_C lanes each, of which C are used.
# Passes   one: the rows stay on chip between their moments (two passes over registers, float32) and the result.
# Bytes    2 * T*C * itemsize (x in, y out), + 1 for residual, + 1 for total; time >= bytes / bandwidth.
# Limits   C up to 16384; no atomics; a row's bits do not depend on the others. No backward.
# Twin     reference.layer_norm
"""Layer normalisation in Triton. The specification is ``fastdiff.kernels.reference.layer_norm``."""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import ShapeError

from .edge import DTYPES, check_like, check_vectors, chip_of, writable
from .statistics import moments, normalise, read
from .tiles import RowTile, lookup

WIDEST = 16384


@triton.jit
def _layer_norm_kernel(
    x, y, total, residual, weight, bias, T, C, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    used = channel < C
    inside = (token < T)[:, None] & used[None, :]
    place = token.to(tl.int64)[:, None] * C + channel[None, :]
    values = read(x, total, residual, None, place, place, inside).to(tl.float32)
    mean, low, m2 = moments((values,), (inside,), C, 0, 1, False)
    rstd = 1.0 / tl.sqrt_rn(m2 / C + eps)
    gain = rstd[:, None]
    offset = -(low * rstd)[:, None]
    if weight is not None:
        factor = tl.load(weight + channel, mask=used, other=0.0).to(tl.float32)[None, :]
        gain *= factor
        offset *= factor
    if bias is not None:
        offset += tl.load(bias + channel, mask=used, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, normalise(values, mean[:, None], gain, offset, False), mask=inside)


INTERPRETED = not isinstance(_layer_norm_kernel, triton.JITFunction)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Layer normalisation of ``x + residual`` over the last dimension.

    Args:
        x: ``[..., C]``, not empty, ``C <= 16384``; what is not contiguous is copied first.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        eps: added to the variance.
        residual: like ``x``, or None; added to ``x`` before the norm.
        total: like ``x``, contiguous, or None; the sum is written here, also over ``x`` or ``residual``.
        out: like ``x``, or None; written and returned, and may be ``x`` itself.

    Returns:
        ``[..., C]`` in the dtype of ``x``.

    Raises:
        ShapeError: if a shape, dtype or layout does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    if x.dim() == 0 or x.numel() == 0 or x.dtype not in DTYPES or x.shape[-1] > WIDEST:
        allowed = f"[..., C <= {WIDEST}], not empty, in {', '.join(map(str, DTYPES))}"
        raise ShapeError(f"layer_norm: x {tuple(x.shape)} {x.dtype}; allowed: {allowed}")
    check_vectors("layer_norm", tuple(x.shape[-1:]), {"weight": weight, "bias": bias})
    for name, tensor in {"residual": residual, "total": total, "out": out}.items():
        check_like("layer_norm", name, tensor, x)
    if total is not None and not total.is_contiguous():
        raise ShapeError(f"layer_norm: total has strides {total.stride()}; allowed: contiguous")
    given = tuple(t for t in (x, weight, bias, residual, total, out) if t is not None)
    chip = chip_of("layer_norm", given, interpreted=INTERPRETED)
    tile = cast(RowTile, lookup("layer_norm", "any", x.dtype, chip.architecture))
    C = x.shape[-1]
    T, lanes = x.numel() // C, triton.next_power_of_2(C)
    rows = max(1, tile.elements // lanes)
    x = x.contiguous()
    y = writable(out, x)
    parameters = (None if t is None else t.contiguous() for t in (residual, weight, bias))
    with torch.cuda.device_of(x):
        _layer_norm_kernel[(triton.cdiv(T, rows),)](
            x, y, total, *parameters, T, C, eps,
            ROWS=rows, BLOCK_C=lanes, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y if out is None or y is out else out.copy_(y)
