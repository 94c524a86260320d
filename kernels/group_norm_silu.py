# GroupNorm + modulation + SiLU, forward, channels-last, split over rows so that batch 1 still fills the chip.
#
# Shapes   x, y [N, P, C] contiguous (P = H*W), fp32, fp16 or bf16; weight, bias [C]; scale, shift [N, C], any
#          strides; G groups of C / G channels. A program holds BLOCK_C lanes of channels, of which the first
#          GROUPS * (C / G) are used: whole groups only, a multiple of 8 channels where that is possible, so
#          that loads stay wide.
# Grid     split: (N * S, ceil(G / GROUPS)): a program reduces, then applies, split p % S of image p // S.
#          whole: (N, ceil(G / GROUPS)): the image's tile stays on chip between the two.
# Passes   mean and M2 per lane (Welford), per channel, per group, per split (Chan's merge, float32; never
#          E[x^2] - E[x]^2, which cancels when |mean| >> std), then y = (x - mean) * gain + offset, not x *
#          gain + offset', which cancels in the same way. A merged mean is a pair, mean + low, because one
#          float32 holds it to |mean| * 6e-8 at best; `low` ends up in the offset and costs nothing per
#          element.
# Bytes    2 * N*P*C * itemsize when x stays on chip or in L2 between the passes, 3 * otherwise; time >= bytes
#          / bandwidth.
# Limits   any C, G, H, W; no atomics, so runs repeat bit for bit; S does not depend on N, so an image's bits
#          do not depend on its batch. An x that is not channels-last costs two copies. No backward.
# Twin     reference.group_norm_silu
"""Fused GroupNorm, modulation and SiLU in Triton. The specification is ``reference.group_norm_silu``."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import ShapeError

from .tiles import Chip, NormTile, chip_of, lookup

WHOLE_ELEMENTS = 16384  # 64 float32 registers for each of the 256 threads of a "whole" program
MOST_SPLITS = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _merge(mean, low, m2, count, total, AXIS: tl.constexpr):
    """Chan's merge along AXIS into (mean, low, M2); a part has `count` members, maybe 0, all have `total`."""
    present = count > 0
    merged = tl.sum(tl.where(present, mean, 0.0) * count, axis=AXIS) / total
    apart = tl.where(present, mean - tl.expand_dims(merged, AXIS) + low, 0.0)
    merged_low = tl.sum(apart * count, axis=AXIS) / total
    apart -= tl.expand_dims(merged_low, AXIS)
    return merged, merged_low, tl.sum(tl.where(present, m2, 0.0) + count * apart * apart, axis=AXIS)


@triton.jit
def _merge_channels(mean, low, m2, count, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr):
    """Channels [BLOCK_C], each over `count` pixels, into groups [BLOCK_G] of WIDTH channels."""
    member = tl.arange(0, mean.shape[0])[:, None] // WIDTH == tl.arange(0, BLOCK_G)[None, :]
    counts = tl.where(member, 1.0 * count, 0.0)
    return _merge(mean[:, None], low[:, None], m2[:, None], counts, 1.0 * count * WIDTH, 0)


@triton.jit
def _affine(
    mean, low, m2, weight, bias, scale, shift, image, first, C, P, eps, scale_n, scale_c, shift_n, shift_c,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Spread group statistics [BLOCK_G] over channels, with the parameters: mean, gain, offset."""
    lane = tl.arange(0, BLOCK_C)
    member = lane[:, None] // WIDTH == tl.arange(0, mean.shape[0])[None, :]
    rstd = 1.0 / tl.sqrt_rn(m2 / (1.0 * P * WIDTH) + eps)
    channel_mean = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1)  # one term each: exact
    gain = tl.sum(tl.where(member, rstd[None, :], 0.0), axis=1)

    channel = first + lane
    inside = (lane < GROUPS * WIDTH) & (channel < C)
    gain *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + image * scale_n + channel * scale_c, mask=inside, other=0.0).to(tl.float32) + 1.0
        gain *= factor
        offset *= factor
    if shift is not None:
        offset += tl.load(shift + image * shift_n + channel * shift_c, mask=inside, other=0.0).to(tl.float32)
    offset -= tl.sum(tl.where(member, low[None, :], 0.0), axis=1) * gain
    return channel_mean[None, :], gain[None, :], offset[None, :]


@triton.jit
def _normalise(values, mean, gain, offset, SILU: tl.constexpr):
    y = (values - mean) * gain + offset
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _whole_kernel(
    x, y, weight, bias, scale, shift, C, P, eps, scale_n, scale_c, shift_n, shift_c,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (GROUPS * WIDTH)
    lane = tl.arange(0, BLOCK_C)
    row = tl.arange(0, ROWS)
    inside = (row < P)[:, None] & ((lane < GROUPS * WIDTH) & (first + lane < C))[None, :]
    place = row[:, None] * C + (first + lane)[None, :]
    values = tl.load(x + image * P * C + place, mask=inside, other=0.0).to(tl.float32)

    mean, low, m2 = _merge(values, 0.0, 0.0, inside.to(tl.float32), P, 0)
    mean, low, m2 = _merge_channels(mean, low, m2, P, WIDTH, BLOCK_G)
    mean, gain, offset = _affine(
        mean, low, m2, weight, bias, scale, shift, image, first, C, P, eps,
        scale_n, scale_c, shift_n, shift_c, WIDTH, GROUPS, BLOCK_C,
    )  # fmt: skip
    tl.store(y + image * P * C + place, _normalise(values, mean, gain, offset, SILU), mask=inside)


@triton.jit
def _reduce_kernel(
    x, partial, C, P, G, splits, split_rows,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # partial [N, S, 3, G] float32: mean, low and M2 of each group over the rows of one split.
    image = (tl.program_id(0) // splits).to(tl.int64)
    start = (tl.program_id(0) % splits) * split_rows
    stop = tl.minimum(start + split_rows, P)
    first = tl.program_id(1) * (GROUPS * WIDTH)
    lane = tl.arange(0, BLOCK_C)
    row = tl.arange(0, ROWS)
    used = (lane < GROUPS * WIDTH) & (first + lane < C)
    place = row[:, None] * C + (first + lane)[None, :]

    count = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, BLOCK_C], tl.float32)
    m2 = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for at in range(start, stop, ROWS):
        present = row < stop - at
        inside = present[:, None] & used[None, :]
        values = tl.load(x + (image * P + at) * C + place, mask=inside, other=0.0).to(tl.float32)
        count += present.to(tl.float32)
        before = tl.where(inside, values - mean, 0.0)
        mean += before * (1.0 / tl.maximum(count, 1.0))[:, None]
        m2 += before * (values - mean)  # 0 where the row is absent, since `before` is

    rows = (stop - start).to(tl.float32)
    mean, low, m2 = _merge(mean, 0.0, m2, count[:, None], rows, 0)
    mean, low, m2 = _merge_channels(mean, low, m2, rows, WIDTH, BLOCK_G)

    group = tl.arange(0, BLOCK_G)
    number = tl.program_id(1) * GROUPS + group
    held = (group < GROUPS) & (number < G)
    target = partial + tl.program_id(0).to(tl.int64) * 3 * G + number
    tl.store(target, mean, mask=held)
    tl.store(target + G, low, mask=held)
    tl.store(target + 2 * G, m2, mask=held)


@triton.jit
def _apply_kernel(
    x, y, partial, weight, bias, scale, shift, C, P, G, splits, split_rows, eps,
    scale_n, scale_c, shift_n, shift_c,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // splits).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    number = tl.program_id(1) * GROUPS + group
    split = tl.arange(0, BLOCK_S)
    held = (split < splits)[:, None] & ((group < GROUPS) & (number < G))[None, :]
    source = partial + (image * splits + split[:, None]) * 3 * G + number[None, :]
    part_mean = tl.load(source, mask=held, other=0.0)
    part_low = tl.load(source + G, mask=held, other=0.0)
    part_m2 = tl.load(source + 2 * G, mask=held, other=0.0)
    rows = tl.minimum(tl.maximum(P - split * split_rows, 0), split_rows).to(tl.float32)
    mean, low, m2 = _merge(part_mean, part_low, part_m2, (rows * WIDTH)[:, None], 1.0 * P * WIDTH, 0)

    first = tl.program_id(1) * (GROUPS * WIDTH)
    mean, gain, offset = _affine(
        mean, low, m2, weight, bias, scale, shift, image, first, C, P, eps,
        scale_n, scale_c, shift_n, shift_c, WIDTH, GROUPS, BLOCK_C,
    )  # fmt: skip
    start = (tl.program_id(0) % splits) * split_rows
    stop = tl.minimum(start + split_rows, P)
    lane = tl.arange(0, BLOCK_C)
    row = tl.arange(0, ROWS)
    used = (lane < GROUPS * WIDTH) & (first + lane < C)
    place = row[:, None] * C + (first + lane)[None, :]
    for at in range(start, stop, ROWS):
        inside = (row < stop - at)[:, None] & used[None, :]
        base = (image * P + at) * C
        values = tl.load(x + base + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + base + place, _normalise(values, mean, gain, offset, SILU), mask=inside)


INTERPRETED = not isinstance(_whole_kernel, triton.JITFunction)


class Plan(NamedTuple):
    """How one image is cut. ``splits`` is 0 when its tile stays on chip."""

    blocks: int
    splits: int
    split_rows: int
    constants: dict[str, int]
    warps: int


def _lanes(C: int, groups: int, wanted: int) -> tuple[int, int]:
    """Return (groups in a block, lanes of a block): about ``wanted`` lanes, in steps of 8 if they fit."""
    width = C // groups
    lanes = max(wanted, triton.next_power_of_2(width))
    if lanes >= C:
        return groups, triton.next_power_of_2(C)
    fit = lanes // width
    step = 8 // gcd(8, width)
    return (fit - fit % step or fit), lanes


def plan(C: int, P: int, groups: int, dtype: torch.dtype, chip: Chip) -> Plan:
    """Cut ``[P, C]`` for a chip. The batch is not an argument: an image's bits must not depend on it."""
    tile = cast(NormTile, lookup("group_norm_silu", "whole", dtype, chip.architecture))
    fit, lanes = _lanes(C, groups, tile.channels)
    whole_rows = triton.next_power_of_2(P)
    whole = whole_rows * lanes <= WHOLE_ELEMENTS
    if not whole:
        tile = cast(NormTile, lookup("group_norm_silu", "split", dtype, chip.architecture))
        # Once or twice the lanes, whichever leaves fewer of them idle: 80 channels of 128, but 240 of 256.
        choices = [_lanes(C, groups, tile.channels), _lanes(C, groups, 2 * tile.channels)]
        fit, lanes = min(choices, key=lambda choice: triton.cdiv(groups, choice[0]) * choice[1])
    blocks = triton.cdiv(groups, fit)
    widest = triton.next_power_of_2(fit)
    constants = {"WIDTH": C // groups, "GROUPS": fit, "BLOCK_G": widest, "BLOCK_C": lanes}
    if whole:
        return Plan(blocks, 0, P, {**constants, "ROWS": whole_rows}, tile.warps)
    rows = max(1, tile.rows * tile.channels // lanes)
    wanted = min(MOST_SPLITS, triton.cdiv(tile.waves * chip.multiprocessors, blocks), triton.cdiv(P, rows))
    split_rows = triton.cdiv(P, wanted)
    return Plan(blocks, triton.cdiv(P, split_rows), split_rows, {**constants, "ROWS": rows}, tile.warps)


def _check(x: Tensor, groups: int, affine: dict[str, Tensor], modulation: dict[str, Tensor | None]) -> None:
    if x.dim() != 4 or x.dtype not in DTYPES:
        allowed = ", ".join(map(str, DTYPES))
        raise ShapeError(f"group_norm_silu: x {tuple(x.shape)} {x.dtype}; allowed: [N, C, H, W] in {allowed}")
    if groups < 1 or x.shape[1] % groups:
        raise ShapeError(f"group_norm_silu: {groups} groups; allowed: a divisor of C = {x.shape[1]}")
    for name, vector in {**affine, **modulation}.items():
        shape = tuple(x.shape[1:2] if name in affine else x.shape[:2])
        if vector is not None and (tuple(vector.shape) != shape or vector.dtype not in DTYPES):
            received = f"{tuple(vector.shape)} {vector.dtype}"
            raise ShapeError(f"group_norm_silu: {name} {received}; allowed: {shape} of the same kinds as x")


Vectors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _launch(x: Tensor, vectors: Vectors, groups: int, eps: float, silu: bool, chip: Chip) -> Tensor:
    """Launch for channels-last ``x``; everything is checked."""
    N, C, H, W = x.shape
    P = H * W
    cut = plan(C, P, groups, x.dtype, chip)
    y = torch.empty_like(x)
    weight, bias, scale, shift = vectors
    strides = [stride for v in (scale, shift) for stride in ((0, 0) if v is None else v.stride())]
    parameters = (weight.contiguous(), bias.contiguous(), scale, shift)
    # Fusion is stated because Triton 3.10 changes its default, and with it the bits.
    options = {"num_warps": cut.warps, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):
        if cut.splits == 0:
            _whole_kernel[(N, cut.blocks)](
                x, y, *parameters, C, P, eps, *strides, **cut.constants, SILU=silu, **options
            )
            return y
        partial = torch.empty(N, cut.splits, 3, groups, device=x.device, dtype=torch.float32)
        grid, sizes = (N * cut.splits, cut.blocks), (C, P, groups, cut.splits, cut.split_rows)
        _reduce_kernel[grid](x, partial, *sizes, **cut.constants, **options)
        constants = {**cut.constants, "BLOCK_S": triton.next_power_of_2(cut.splits), "SILU": silu}
        _apply_kernel[grid](x, y, partial, *parameters, *sizes, eps, *strides, **constants, **options)
    return y


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
) -> Tensor:
    """Group normalisation, optional per-image modulation, optional SiLU, in one op.

    Args:
        x: ``[N, C, H, W]``; channels-last is read in place, any other layout is copied to it and back.
        weight: ``[C]``.
        bias: ``[C]``.
        groups: number of groups; divides ``C``.
        eps: added to the variance.
        scale: ``[N, C]``, any strides, or None; the normalised value is multiplied by ``1 + scale``.
        shift: ``[N, C]``, any strides, or None; added after ``scale``.
        silu: apply ``y * sigmoid(y)`` last.

    Returns:
        ``[N, C, H, W]`` in the dtype and layout of ``x``.

    Raises:
        ShapeError: if a shape or dtype does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".
    """
    _check(x, groups, {"weight": weight, "bias": bias}, {"scale": scale, "shift": shift})
    tensors = tuple(t for t in (x, weight, bias, scale, shift) if t is not None)
    chip = chip_of("group_norm_silu", tensors, interpreted=INTERPRETED)
    if x.numel() == 0:
        return torch.empty_like(x)
    rows = x.contiguous(memory_format=torch.channels_last)  # the same tensor where x is channels-last
    y = _launch(rows, (weight, bias, scale, shift), groups, eps, silu, chip)
    return y if rows is x else torch.empty_like(x).copy_(y)
