"""What the kernels of group and layer normalisation share: how values are read, merged into moments, and spread.

Mean and M2 are merged by Chan's formulas in float32, never E[x^2] - E[x]^2, which cancels when |mean| >> std, and
applied as y = (x - mean) * gain + offset, not x * gain + offset', which cancels in the same way. A merged mean is a
pair, mean + low, because one float32 holds it to |mean| * 6e-8 at best; `low` ends up in the offset and costs nothing
per element.

Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(x, total, residual, row, seen, place, inside):
    """X + residual + row at some places, in the type of x, rounded once; written to `total` where that is given.

    `row [lanes]` float32, or None; `seen`: the same places in x, whose pixels may lie further apart.
    """
    values = tl.load(x + seen, mask=inside, other=0.0)
    if residual is not None or row is not None:
        wide = values.to(tl.float32)
        if residual is not None:
            wide += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        if row is not None:
            wide += row[None, :]
        values = wide.to(x.dtype.element_ty)
    if total is not None:
        tl.store(total + place, values, mask=inside)
    return values


@triton.jit
def again(values, zero, OPAQUE: tl.constexpr):
    """The same values. OPAQUE: the compiler does not see that, so it cannot keep what was computed from them before.

    A tile is held in its own type: widened to float32 for each pass anew it takes half the registers. `zero` is 0,
    which no compiler knows of an argument.
    """
    if OPAQUE and values.dtype.primitive_bitwidth == 16:
        values = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;", "=r,r,r,r", [values, zero], values.dtype, is_pure=True, pack=2
        )
    return values


@triton.jit
def moments(held, inside, count, zero, AXIS: tl.constexpr, OPAQUE: tl.constexpr):
    """(mean, low, M2) along AXIS of pieces of a tile on chip; `count` values each, 0 where not `inside`."""
    total = held[0].to(tl.float32)
    for i in tl.static_range(1, len(held)):
        total += held[i].to(tl.float32)
    mean = tl.sum(total, axis=AXIS) / count
    middle = tl.expand_dims(mean, AXIS)
    first = tl.where(inside[0], again(held[0], zero, OPAQUE).to(tl.float32) - middle, 0.0)
    second = first * first
    for i in tl.static_range(1, len(held)):
        apart = tl.where(inside[i], again(held[i], zero, OPAQUE).to(tl.float32) - middle, 0.0)
        first += apart
        second += apart * apart
    low = tl.sum(first, axis=AXIS) / count
    return mean, low, tl.maximum(tl.sum(second, axis=AXIS) - count * low * low, 0.0)


@triton.jit
def merge(mean, low, m2, count, total, AXIS: tl.constexpr):
    """Chan's merge along AXIS into (mean, low, M2); a part has `count` members, maybe 0, all have `total`."""
    present = count > 0
    merged = tl.sum(tl.where(present, mean, 0.0) * count, axis=AXIS) / total
    apart = tl.where(present, mean - tl.expand_dims(merged, AXIS) + low, 0.0)
    merged_low = tl.sum(apart * count, axis=AXIS) / total
    apart -= tl.expand_dims(merged_low, AXIS)
    return merged, merged_low, tl.sum(tl.where(present, m2, 0.0) + count * apart * apart, axis=AXIS)


@triton.jit
def merge_channels(mean, low, m2, count, lane, group, WIDTH: tl.constexpr):
    """Channels [BLOCK_C], each over `count` pixels, into groups [BLOCK_G] of WIDTH channels."""
    member = lane[:, None] // WIDTH == group[None, :]
    counts = tl.where(member, 1.0 * count, 0.0)
    return merge(mean[:, None], low[:, None], m2[:, None], counts, 1.0 * count * WIDTH, 0)


@triton.jit
def affine(
    mean, low, m2, weight, bias, scale, shift, image, channel, lane, group, inside, count, eps,
    scale_n, scale_c, shift_n, shift_c, WIDTH: tl.constexpr,
):  # fmt: skip
    """Spread the moments of groups [BLOCK_G], `count` values each, over channels, with the parameters."""
    member = lane[:, None] // WIDTH == group[None, :]
    rstd = 1.0 / tl.sqrt_rn(m2 / count + eps)
    channel_mean = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1)  # one term each: exact
    gain = tl.sum(tl.where(member, rstd[None, :], 0.0), axis=1)
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
def normalise(values, mean, gain, offset, SILU: tl.constexpr):
    """(values - mean) * gain + offset, through SiLU if asked for."""
    y = (values - mean) * gain + offset
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y
