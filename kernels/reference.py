"""Every op in plain torch. This file is the specification; each fast kernel is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .sums import Sums


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Group normalisation of ``x + residual + row``, optional per-image modulation, optional SiLU, in one op.

    Args:
        x: ``[N, C, H, W]``, any layout; the result keeps it.
        weight: ``[C]``.
        bias: ``[C]``.
        groups: number of groups; divides ``C``.
        eps: added to the variance.
        scale: ``[N, C]`` or None; the normalised value is multiplied by ``1 + scale``.
        shift: ``[N, C]`` or None; added after ``scale``.
        silu: apply ``y * sigmoid(y)`` last.
        row: ``[N, C]`` or None; added to ``x`` before the norm.
        residual: like ``x``, or None; added to ``x`` before the norm.
        total: like ``x``, or None; the sum is written here.

    Returns:
        ``[N, C, H, W]`` in the dtype of ``x``.

    Source: Wu and He 2018, arXiv:1803.08494; the modulation is Dhariwal and Nichol 2021, arXiv:2105.05233, sec. 4.3.
    """
    x = x if residual is None else x + residual
    x = x if row is None else x + row[:, :, None, None]
    if total is not None:
        total.copy_(x)
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None])
    if shift is not None:
        y = y + shift[:, :, None, None]
    return F.silu(y) if silu else y


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Layer normalisation of ``x + residual`` over the last dimension.

    Args:
        x: ``[..., C]``.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        eps: added to the variance.
        residual: like ``x``, or None; added to ``x`` before the norm.
        total: like ``x``, or None; the sum is written here.

    Returns:
        ``[..., C]``.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    x = x if residual is None else x + residual
    if total is not None:
        total.copy_(x)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def geglu(x: Tensor) -> Tensor:
    """The first half of the last dimension times the exact GELU of the second: ``[..., 2 * I]`` -> ``[..., I]``.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(gate) * value


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, self or cross.

    Args:
        q: ``[N, heads, L, d]``.
        k: ``[N, heads, M, d]``.
        v: ``[N, heads, M, d]``.

    Returns:
        ``[N, heads, L, d]``: ``softmax(q k^T / sqrt(d)) v``.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    return F.scaled_dot_product_attention(q, k, v)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in]``, ``weight [out, in]``, ``bias [out]`` or None -> ``[..., out]``."""
    return F.linear(x, weight, bias)


def add(x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None = None) -> Tensor:
    """What follows a layer, in one pass.

    Args:
        x: ``[B, H, W, C]``.
        bias: ``[C]``, added to every pixel, or None.
        residual: ``[B, H, W, C]``, any strides, or None.
        out: where to write, ``[B, H, W, C]`` with dense channels, or None.

    Returns:
        ``out``, or a new tensor.
    """
    for more in (bias, residual):
        x = x if more is None else x + more
    return x if out is None else out.copy_(x)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour enlargement, then a 3x3 convolution of padding 1.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C', C, 3, 3]``.
        bias: ``[C']`` or None.
        size: height and width of the result.

    Returns:
        ``[N, C', *size]``.
    """
    return F.conv2d(F.interpolate(x, size=tuple(size), mode="nearest"), weight, bias, padding=1)


def combine(
    registers: Sequence[Tensor | None], sums: Sums, dtypes: Sequence[torch.dtype] | None = None
) -> tuple[Tensor, ...]:
    """Weighted sums of registers.

    Everything between two evaluations of a network that is linear is one such call: guidance (the weights of the strong
    and the weak output), the solver's update, its history, and the scaled input of the next evaluation in its dtype.

    A zero weight never multiplies what it leaves out: a register that holds NaN or infinity at an image whose
    weight is 0 does not reach that image's result.

    Args:
        registers: each ``[B, C, H, W]`` in float32, float16 or bfloat16, or None where no output lists it.
        sums: weights and lists of what is read.
        dtypes: of each output; float32 where None. Sums are formed in float32.

    Returns:
        One ``[B, C, H, W]`` for each output; an output that lists no register is zero.
    """
    results = []
    for terms in sums.terms:
        total = None
        for index, weight in terms:
            term = weight * registers[index]
            if sums.mixed:
                term = torch.where(weight == 0, 0, term)
            total = term if total is None else total + term
        if total is None:
            like = next(r for r in registers if r is not None)
            total = torch.zeros_like(like, dtype=sums.weights.dtype)
        results.append(total)
    if dtypes is not None:
        results = [result.to(dtype) for result, dtype in zip(results, dtypes, strict=True)]
    return tuple(results)
