"""Every kernel against its plain twin, in Triton's interpreter or on a GPU.

The interpreter truncates float32 to bfloat16 where a GPU rounds; the tolerance leaves room for that.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from drawing import double  # noqa: E402
from tolerances import assert_no_worse_than  # noqa: E402

from fastdiff.errors import BackendError, ShapeError  # noqa: E402
from fastdiff.kernels import Sums, reference  # noqa: E402
from fastdiff.kernels import attention as attention_module  # noqa: E402
from fastdiff.kernels import combine as combine_module  # noqa: E402
from fastdiff.kernels import group_norm_silu as norm_module  # noqa: E402
from fastdiff.kernels.edge import chip_of  # noqa: E402
from fastdiff.kernels.tiles import TILES, Chip, lookup  # noqa: E402

# Interpreted code runs in numpy, which warns of the overflow in exp(-y) that makes SiLU 0, and of 0 * nan.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHIPPED_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# Group norm. Shapes: one pixel, ragged, an odd group width, one group over all channels, one group for each
# channel; the last three are too large for one tile and split over rows.
NORM_SHAPES = [
    ((1, 64, 1, 1), 32),
    ((2, 96, 7, 5), 32),
    ((2, 21, 6, 6), 7),
    ((1, 40, 5, 3), 1),
    ((1, 3, 70, 70), 3),
]
NORM_SHAPES += [((2, 96, 20, 17), 32), ((1, 320, 32, 32), 32)]


@pytest.mark.parametrize("mean", [0.0, 100.0])  # 100: a one-pass variance would lose every digit
@pytest.mark.parametrize("dtype", SHIPPED_DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", NORM_SHAPES, ids=str)
def test_group_norm_silu_is_as_accurate_as_torch(shape, groups, dtype, mean, draw):
    N, C = shape[:2]
    x = (draw(*shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = draw(C, dtype=dtype), draw(C, dtype=dtype)
    scale, shift = draw(N, 2 * C, dtype=dtype).chunk(2, dim=1)  # views, as the UNet passes them
    fused = norm_module.group_norm_silu(x, weight, bias, groups, scale=scale, shift=shift)
    # Torch's channels-last kernel for CPUs loses digits at mean 100: compare with the layout it does best.
    plain = reference.group_norm_silu(x.contiguous(), weight, bias, groups, scale=scale, shift=shift)
    wide = [double(t) for t in (x, weight, bias, scale, shift)]
    truth = reference.group_norm_silu(*wide[:3], groups, scale=wide[3], shift=wide[4])
    assert_no_worse_than(fused, plain, truth)
    assert fused.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("given", ["", "scale", "shift", "scale shift"])
@pytest.mark.parametrize("size", [5, 40])  # on chip, split
def test_group_norm_silu_options(size, given, silu, draw):
    x, weight, bias = draw(2, 24, size, size), draw(24), draw(24)
    options = {name: draw(24, 2).T for name in given.split()}
    options |= {"silu": silu, "eps": 0.1}
    fused = norm_module.group_norm_silu(x, weight, bias, 8, **options)
    plain = reference.group_norm_silu(x, weight, bias, 8, **options)
    truth = reference.group_norm_silu(
        x.double(),
        weight.double(),
        bias.double(),
        8,
        **{name: double(option) for name, option in options.items()},
    )
    assert_no_worse_than(fused, plain, truth)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second channel": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (2, 1, 5, 7), (3, 12, 1, 1), (1, 12, 1, 7)], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_group_norm_silu_takes_and_keeps_any_layout(layout, shape, draw):
    x = LAYOUTS[layout](draw(*shape))
    weight, bias = draw(shape[1]), draw(shape[1])
    fused = norm_module.group_norm_silu(x, weight, bias, 1)
    plain = reference.group_norm_silu(x, weight, bias, 1)
    assert_no_worse_than(fused, plain, reference.group_norm_silu(x.double(), weight.double(), bias.double(), 1))
    if layout != "every second channel":
        assert fused.stride() == x.stride()


@pytest.mark.parametrize("size", [4, 40])
def test_group_norm_silu_keeps_groups_and_images_apart(size, draw):
    x = draw(2, 24, size, size)
    x[0, 3, 1, 1] = torch.nan
    fused = norm_module.group_norm_silu(x, draw(24), draw(24), 8)
    assert fused[0, 3:6].isnan().all()
    assert not fused[0, :3].isnan().any() and not fused[0, 6:].isnan().any() and not fused[1].isnan().any()


@pytest.mark.parametrize("size", [5, 40])
def test_group_norm_silu_repeats_bit_for_bit_in_any_batch(size, draw):
    x, weight, bias = draw(3, 24, size, size), draw(24), draw(24)
    together = norm_module.group_norm_silu(x, weight, bias, 8)
    assert torch.equal(together, norm_module.group_norm_silu(x, weight, bias, 8))
    for n in range(3):
        assert torch.equal(together[n : n + 1], norm_module.group_norm_silu(x[n : n + 1], weight, bias, 8))


# Attention. (L, M, d): tiny, cross-attention to 77 tokens, ragged over several tiles, every head size.
ATTENTION_SHAPES = [
    (1, 1, 16),
    (5, 130, 16),
    (70, 77, 40),
    (130, 200, 40),
    (64, 64, 64),
    (33, 150, 80),
    (20, 77, 160),
]
ATTENTION_SHAPES += [(9, 140, 160), (6, 129, 23), (128, 128, 128)]


@pytest.mark.parametrize("dtype", SHIPPED_DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_is_as_accurate_as_torch(shape, dtype, draw):
    L, M, d = shape
    # [N, length, heads, d] seen as [N, heads, length, d], as the UNet passes them
    q, k, v = (draw(2, length, 2, d, dtype=dtype).transpose(1, 2) for length in (L, M, M))
    fused = attention_module.attention(q, k, v)
    plain = reference.attention(q, k, v)
    assert_no_worse_than(fused, plain, reference.attention(q.double(), k.double(), v.double()))
    assert fused.stride() == q.stride()


def test_attention_takes_any_strides_and_large_scores(draw):
    joined = draw(2, 50, 3, 2, 20) * 8  # scores of several hundred: the maximum must be taken out
    q, k, v = (joined[:, :, i].transpose(1, 2) for i in range(3))
    k = k.transpose(2, 3).contiguous().transpose(2, 3)  # lanes that do not lie side by side
    v = v[:, :1].expand(-1, 2, -1, -1)
    fused = attention_module.attention(q, k, v)
    truth = reference.attention(q.double(), k.double(), v.double())
    assert_no_worse_than(fused, reference.attention(q, k, v), truth)


def test_attention_repeats_bit_for_bit_in_any_batch(draw):
    q, k, v = (draw(3, 2, 140, 40) for _ in range(3))
    together = attention_module.attention(q, k, v)
    assert torch.equal(together, attention_module.attention(q, k, v))
    assert torch.equal(together[1:2, 1:], attention_module.attention(q[1:2, 1:], k[1:2, 1:], v[1:2, 1:]))


# Combine.
ACTIVE = [(0, 1, 3, 5), (5, 0), (), (3, 3, 1)]  # several outputs, in any order, one empty


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 3, 7, 5), (2, 4, 64, 64)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_combine_is_as_accurate_as_torch(shape, channels_last, draw):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    registers = [draw(*shape).contiguous(memory_format=layout) if i not in (2, 4) else None for i in range(6)]
    registers[5] = draw(*shape)  # one that may lie otherwise
    weights = draw(shape[0], 30)[:, 2:26].view(shape[0], 4, 6)  # a part of a wider table row
    fused = combine_module.combine(registers, Sums.of(weights, ACTIVE))
    plain = reference.combine(registers, Sums.of(weights, ACTIVE))
    truth = reference.combine([double(r) for r in registers], Sums.of(weights.double(), ACTIVE))
    for results in zip(fused, plain, truth, strict=True):
        assert_no_worse_than(*results)
        assert results[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("stale", [torch.nan, torch.inf])
def test_combine_keeps_out_what_a_zero_weight_leaves_out(stale, draw):
    registers = [draw(3, 4, 9, 9) for _ in range(3)]
    weights = draw(3, 2, 3)
    registers[1][0] = stale
    weights[0, :, 1] = 0.0  # nobody reads it
    registers[2][1] = stale
    weights[1, 0, 2] = -0.0  # one output reads it, the other does not
    sums = Sums.of(torch.nn.functional.pad(weights, (0, 1)), [(0, 1, 2), (1, 2)])
    fused = combine_module.combine([*registers, None], sums)
    for output in range(2):
        kept = [n for n in range(3) if (n, output) != (1, 1)]
        assert fused[output][kept].isfinite().all()
    assert not fused[1][1].isfinite().any()
    plain = reference.combine(registers, Sums.of(weights, [(0, 1, 2), (1, 2)]))
    torch.testing.assert_close(fused, plain, equal_nan=True)


def test_combine_repeats_bit_for_bit_in_any_batch(draw):
    registers, weights = [draw(3, 4, 20, 20) for _ in range(6)], draw(3, 4, 6)
    together = combine_module.combine(registers, Sums.of(weights, ACTIVE))
    again = combine_module.combine(registers, Sums.of(weights, ACTIVE))
    alone = combine_module.combine([r[2:] for r in registers], Sums.of(weights[2:], ACTIVE))
    for one, two, three in zip(together, again, alone, strict=True):
        assert torch.equal(one, two) and torch.equal(one[2:], three)


def test_combine_takes_one_row_for_all_images(draw):
    registers, row = [draw(3, 4, 20, 20) for _ in range(6)], draw(1, 4, 6)
    for ops in (combine_module, reference):
        shared = ops.combine(registers, Sums.of(row, ACTIVE, mixed=False))
        for one, each in zip(shared, ops.combine(registers, Sums.of(row.expand(3, -1, -1), ACTIVE)), strict=True):
            assert torch.equal(one, each)


# The public edge.
def test_launchers_name_what_does_not_fit(draw):
    x, vector = draw(2, 6, 4, 4), draw(6)
    with pytest.raises(ShapeError, match="4 groups"):
        norm_module.group_norm_silu(x, vector, vector, 4)
    with pytest.raises(ShapeError, match="scale"):
        norm_module.group_norm_silu(x, vector, vector, 3, scale=vector)
    with pytest.raises(ShapeError, match="float64"):
        norm_module.group_norm_silu(x.double(), vector, vector, 3)
    with pytest.raises(ShapeError, match="head size 8"):
        attention_module.attention(*[draw(1, 1, 4, 8)] * 3)
    with pytest.raises(ShapeError, match="k "):
        attention_module.attention(draw(1, 1, 4, 16), draw(1, 2, 4, 16), draw(1, 1, 4, 16))
    with pytest.raises(ShapeError, match="register 1"):
        combine_module.combine([x, None], Sums.of(draw(2, 1, 2), [(0, 1)]))
    with pytest.raises(ShapeError, match="weights"):
        combine_module.combine([x], Sums.of(draw(2, 2, 1), [(0,)]))
    with pytest.raises(BackendError, match="grad"):
        norm_module.group_norm_silu(x, vector.clone().requires_grad_(), vector, 3)


def test_chips_that_cannot_run_triton_are_refused():
    with pytest.raises(BackendError, match="cpu"):
        chip_of("combine", (torch.zeros(1),), interpreted=False)
    with pytest.raises(BackendError, match="meta"):
        chip_of("combine", (torch.zeros(1, device="meta"),), interpreted=True)
    with pytest.raises(BackendError, match="7.5"):
        lookup("combine", "any", torch.float32, 75)
    for rows in TILES.values():
        assert [first for first, _ in rows] == sorted({first for first, _ in rows})


@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_group_norm_plan_fills_lanes_and_covers_rows(channels, size):
    P = size * size
    cut = norm_module.plan(channels, P, 32, torch.float16, Chip(90, 132))
    lanes = cut.blocks * cut.constants["BLOCK_C"]
    assert cut.kind == "whole" or cut.constants["GROUPS"] * channels // 32 % 8 == 0  # 16-byte loads
    assert channels / lanes > 0.6
    assert (cut.parts - 1) * cut.rows < P <= cut.parts * cut.rows
