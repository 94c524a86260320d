# GroupNorm + modulation + SiLU, forward, channels-last; optionally of x + residual + row.
#
# Shapes   x, y, residual, total [N, P, C] contiguous (P = H*W), fp32, fp16 or bf16; weight, bias [C]; row, scale, shift
#          [N, C], any strides; G groups of C / G channels. The pixels of x lie x_pixel elements apart, in a part of a
#          wider buffer, or C: None. A program holds BLOCK_C lanes of channels, of which the first GROUPS * (C / G) are
#          used: whole groups only, a multiple of 8 channels where that is possible, so that loads stay wide. An item
#          is one image's channels of one such block.
# Grid     whole: (N * blocks): an item's tile fits one program.
#          team: (teams * T): T programs hold an item's rows on chip, exchange their moments through memory, meet at
#          a counter and apply; then the team takes its next item. All programs must be resident at once, so
#          the launch is a cooperative one and the tile table says how many a multiprocessor holds.
#          split: (N * S, blocks) twice, for images that all multiprocessors together cannot hold.
# Passes   whole, team: one. split: two (reduce, apply).
# Bytes    whole, team: 2 * N*P*C * itemsize (x in, y out), + 1 for residual, + 1 for total; split: 1 more, from
#          L2 where an image fits there. time >= bytes / bandwidth. One launch (split: two).
# Meeting  a counter a team, of any value: all of a turn's arrivals add up to 2^31, so its top bit turns over and the
#          rest is as before. Moments lie in two sets of slots, taken in turn: whoever writes a slot again has met all
#          readers since. PHASE 1 and 2 are the halves before and after the meeting, as launches of their own: what
#          the interpreter runs, where one program ends before the next begins.
# Chip     what a team holds stays in registers in the type of x, and is widened for each pass anew. `zero` is an
#          argument that is 0: what is computed with it looks different from item to item and from pass to pass,
#          so the compiler can neither move it out of the loop nor keep it, either of which would spill.
# Limits   any C, G, H, W; the order of sums is fixed and the atomics only count, so runs repeat bit for bit; the cut
#          does not depend on N, so an image's bits do not depend on its batch. No backward.
# Twin     reference.group_norm_silu
"""The Triton kernels behind ``group_norm_silu``; for the arithmetic see ``statistics.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from .statistics import affine, again, merge, merge_channels, moments, normalise, read


@triton.jit
def _meet(counter, member, team):
    """Wait until all ``team`` (2 or more) programs have come; what they stored before can be read after it."""
    tl.debug_barrier()
    step = tl.where(member == 0, 2147483647 - team + 2, 1)
    before = tl.atomic_add(counter, step, sem="acq_rel", scope="gpu")
    now = before
    while (before ^ now) >= 0:  # the top bit is still as it was
        now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _row(row, image, channel, used, row_n, row_c):
    """The row of one image, float32 [lanes], or None."""
    values = None
    if row is not None:
        values = tl.load(row + image * row_n + channel * row_c, mask=used, other=0.0).to(tl.float32)
    return values


@triton.jit
def _seen(place, image, pixel, channel, P, x_pixel):
    """Where x has what lies at `place` of y."""
    found = place
    if x_pixel is not None:
        found = (image * P + pixel[:, None]) * x_pixel + channel[None, :]
    return found


@triton.jit
def _whole_kernel(
    x, y, total, residual, row, weight, bias, scale, shift, x_pixel, C, P, blocks, eps,
    row_n, row_c, scale_n, scale_c, shift_n, shift_c,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // blocks).to(tl.int64)
    lane, group = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    channel = (tl.program_id(0) % blocks) * (GROUPS * WIDTH) + lane
    used = (lane < GROUPS * WIDTH) & (channel < C)
    pixel = tl.arange(0, ROWS)
    inside = (pixel < P)[:, None] & used[None, :]
    place = image * P * C + pixel[:, None] * C + channel[None, :]
    seen = _seen(place, image, pixel, channel, P, x_pixel)
    values = read(x, total, residual, _row(row, image, channel, used, row_n, row_c), seen, place, inside).to(tl.float32)

    mean, low, m2 = moments((values,), (inside,), P, 0, 0, False)
    mean, low, m2 = merge_channels(mean, low, m2, P, lane, group, WIDTH)
    mean, gain, offset = affine(
        mean, low, m2, weight, bias, scale, shift, image, channel, lane, group, used, 1.0 * P * WIDTH, eps,
        scale_n, scale_c, shift_n, shift_c, WIDTH,
    )  # fmt: skip
    tl.store(y + place, normalise(values, mean, gain, offset, SILU), mask=inside)


@triton.jit
def _team_kernel(
    x, y, total, residual, row, weight, bias, scale, shift, partial, counters, x_pixel, C, P, items, blocks, team, zero,
    eps,
    row_n, row_c, scale_n, scale_c, shift_n, shift_c,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_T: tl.constexpr, SILU: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    # partial [teams, 2, T, 3, BLOCK_G] float32: mean, low and M2 of each group over one member's rows.
    number, member = tl.program_id(0) // team, tl.program_id(0) % team
    teams = tl.num_programs(0) // team
    PIECE: tl.constexpr = ROWS // PIECES
    count = tl.minimum(P - member * ROWS, ROWS).to(tl.float32)
    turn = 0
    for item in range(number, items, teams):
        none = item * zero  # what depends on it is worked out for every item, not held in registers
        lane, group, each = tl.arange(0, BLOCK_C) + none, tl.arange(0, BLOCK_G) + none, tl.arange(0, BLOCK_T) + none
        pixel = member * ROWS + tl.arange(0, PIECE) + none
        image = (item // blocks).to(tl.int64)
        channel = (item % blocks) * (GROUPS * WIDTH) + lane
        used = (lane < GROUPS * WIDTH) & (channel < C)
        base, place = image * P * C, pixel[:, None] * C + channel[None, :]
        added = _row(row, image, channel, used, row_n, row_c)
        held, inside = (), ()
        for i in tl.static_range(PIECES):
            here = (pixel + i * PIECE < P)[:, None] & used[None, :]
            inside = inside + ((pixel + zero + i * PIECE < P)[:, None] & used[None, :],)
            piece = read(
                x if x_pixel is not None else x + base, None if total is None or PHASE == 2 else total + base,
                None if residual is None else residual + base, added,
                _seen(place + i * PIECE * C, image, pixel + i * PIECE, channel, P, x_pixel), place + i * PIECE * C,
                here,
            )  # fmt: skip
            held = held + (piece,)
        slots = partial + (number * 2 + turn).to(tl.int64) * team * 3 * BLOCK_G
        if PHASE != 2:
            mean, low, m2 = moments(held, inside, count, zero, 0, PHASE == 0)
            mean, low, m2 = merge_channels(mean, low, m2, count, lane, group, WIDTH)
            mine = slots + member * 3 * BLOCK_G + group
            tl.store(mine, mean)
            tl.store(mine + BLOCK_G, low)
            tl.store(mine + 2 * BLOCK_G, m2)
        if PHASE == 0:
            _meet(counters + number, member, team)
        if PHASE != 1:
            theirs = slots + each[:, None] * 3 * BLOCK_G + group[None, :]
            come = (each < team)[:, None]  # .cg: the first-level cache may hold what lay here two turns ago
            mean = tl.load(theirs, mask=come, other=0.0, cache_modifier=".cg")
            low = tl.load(theirs + BLOCK_G, mask=come, other=0.0, cache_modifier=".cg")
            m2 = tl.load(theirs + 2 * BLOCK_G, mask=come, other=0.0, cache_modifier=".cg")
            counts = tl.minimum(tl.maximum(P - each * ROWS, 0), ROWS).to(tl.float32) * WIDTH
            mean, low, m2 = merge(mean, low, m2, counts[:, None], 1.0 * P * WIDTH, 0)
            there, channel = pixel + zero, channel + zero  # worked out anew, like the values, rather than held
            used = (lane < GROUPS * WIDTH) & (channel < C)
            place = there[:, None] * C + channel[None, :]
            mean, gain, offset = affine(
                mean, low, m2, weight, bias, scale, shift, image, channel, lane, group, used, 1.0 * P * WIDTH, eps,
                scale_n, scale_c, shift_n, shift_c, WIDTH,
            )  # fmt: skip
            for i in tl.static_range(PIECES):
                values = normalise(again(held[i], -zero, PHASE == 0).to(tl.float32), mean, gain, offset, SILU)
                tl.store(
                    y + base + place + i * PIECE * C, values, mask=(there + i * PIECE < P)[:, None] & used[None, :]
                )
        turn = 1 - turn


@triton.jit
def _reduce_kernel(
    x, total, residual, row, partial, x_pixel, C, P, G, splits, split_rows, row_n, row_c,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # partial [N, S, 3, G] float32: mean, low and M2 of each group over the rows of one split (Welford by lane).
    image = (tl.program_id(0) // splits).to(tl.int64)
    start = (tl.program_id(0) % splits) * split_rows
    stop = tl.minimum(start + split_rows, P)
    lane, group = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    channel = tl.program_id(1) * (GROUPS * WIDTH) + lane
    pixel = tl.arange(0, ROWS)
    used = (lane < GROUPS * WIDTH) & (channel < C)
    place = pixel[:, None] * C + channel[None, :]
    added = _row(row, image, channel, used, row_n, row_c)

    count = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, BLOCK_C], tl.float32)
    m2 = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for at in range(start, stop, ROWS):
        present = pixel < stop - at
        inside = present[:, None] & used[None, :]
        base = (image * P + at) * C + place
        seen = _seen(base, image, pixel + at, channel, P, x_pixel)
        values = read(x, total, residual, added, seen, base, inside).to(tl.float32)
        count += present.to(tl.float32)
        before = tl.where(inside, values - mean, 0.0)
        mean += before * (1.0 / tl.maximum(count, 1.0))[:, None]
        m2 += before * (values - mean)  # 0 where the row is absent, since `before` is

    rows = (stop - start).to(tl.float32)
    mean, low, m2 = merge(mean, 0.0, m2, count[:, None], rows, 0)
    mean, low, m2 = merge_channels(mean, low, m2, rows, lane, group, WIDTH)

    number = tl.program_id(1) * GROUPS + group
    held = (group < GROUPS) & (number < G)
    target = partial + tl.program_id(0).to(tl.int64) * 3 * G + number
    tl.store(target, mean, mask=held)
    tl.store(target + G, low, mask=held)
    tl.store(target + 2 * G, m2, mask=held)


@triton.jit
def _apply_kernel(
    x, y, residual, row, weight, bias, scale, shift, partial, x_pixel, C, P, G, splits, split_rows, eps,
    row_n, row_c, scale_n, scale_c, shift_n, shift_c,
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
    mean, low, m2 = merge(part_mean, part_low, part_m2, (rows * WIDTH)[:, None], 1.0 * P * WIDTH, 0)

    lane = tl.arange(0, BLOCK_C)
    channel = tl.program_id(1) * (GROUPS * WIDTH) + lane
    used = (lane < GROUPS * WIDTH) & (channel < C)
    mean, gain, offset = affine(
        mean, low, m2, weight, bias, scale, shift, image, channel, lane, group, used, 1.0 * P * WIDTH, eps,
        scale_n, scale_c, shift_n, shift_c, WIDTH,
    )  # fmt: skip
    start = (tl.program_id(0) % splits) * split_rows
    stop = tl.minimum(start + split_rows, P)
    pixel = tl.arange(0, ROWS)
    place = pixel[:, None] * C + channel[None, :]
    added = _row(row, image, channel, used, row_n, row_c)
    for at in range(start, stop, ROWS):
        inside = (pixel < stop - at)[:, None] & used[None, :]
        base = (image * P + at) * C + place
        seen = _seen(base, image, pixel + at, channel, P, x_pixel)
        values = read(x, None, residual, added, seen, base, inside).to(tl.float32)
        tl.store(y + base, normalise(values, mean, gain, offset, SILU), mask=inside)
