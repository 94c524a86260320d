"""What the kernels do beside the plain op: sums before a norm, given outputs, packed inputs, dtypes, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from drawing import double, poisoned  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tolerances import assert_no_worse_than  # noqa: E402

from fastdiff.errors import ShapeError  # noqa: E402
from fastdiff.kernels import Sums, reference, triton_ops  # noqa: E402
from fastdiff.kernels import group_norm_silu as norm_module  # noqa: E402
from fastdiff.kernels.attention import attention  # noqa: E402
from fastdiff.kernels.combine import combine  # noqa: E402
from fastdiff.kernels.geglu import geglu  # noqa: E402
from fastdiff.kernels.group_norm_silu import Workspace, group_norm_silu  # noqa: E402
from fastdiff.kernels.layer_norm import layer_norm  # noqa: E402
from fastdiff.kernels.tiles import INTERPRETER, Chip  # noqa: E402

# Interpreted code runs in numpy, which warns of overflow in exp and of NaN in what was left out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = {"whole": (5, 7), "team": (40, 40), "split": (96, 128)}  # height and width of 24 channels


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_sizes_are_of_the_kinds_they_stand_for(kind):
    height, width = KINDS[kind]
    assert norm_module.plan(24, height * width, 8, torch.float32, INTERPRETER).kind == kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_group_norm_of_a_sum(kind, dtype, draw):
    x, residual = (last(draw(2, 24, *KINDS[kind], dtype=dtype)) for _ in range(2))
    weight, bias, rows = draw(24, dtype=dtype), draw(24, dtype=dtype), draw(2, 72, dtype=dtype)
    options = dict(zip(("scale", "shift", "row"), rows.chunk(3, dim=1), strict=True)) | {"residual": residual}
    total, out, of_plain = poisoned(x), poisoned(x), poisoned(x)
    fused = group_norm_silu(x, weight, bias, 8, total=total, out=out, **options)
    assert fused is out
    plain = reference.group_norm_silu(x, weight, bias, 8, total=of_plain, **options)
    exact = {name: double(value) for name, value in options.items()}
    exact_total = torch.empty_like(x, dtype=torch.float64)
    truth = reference.group_norm_silu(x.double(), weight.double(), bias.double(), 8, total=exact_total, **exact)
    assert_no_worse_than(total, of_plain, exact_total)
    # what is normalised is the sum as it is stored: judge the norm of that
    own = exact | {"row": None, "residual": None}
    stored = reference.group_norm_silu(total.double(), weight.double(), bias.double(), 8, **own)
    narrow = {name: options[name] for name in ("scale", "shift")}
    assert_no_worse_than(out, reference.group_norm_silu(total, weight, bias, 8, **narrow), stored)
    assert (out.double() - truth).abs().max() <= 4 * (plain.double() - truth).abs().max() + 1e-5


@pytest.mark.parametrize("summed", [False, True], ids=["plain", "of a sum"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_group_norm_of_a_part_of_a_wider_buffer(kind, summed, draw, monkeypatch):
    wide = poisoned(last(draw(2, 56, *KINDS[kind])))
    part, dense = wide[:, 16:40], last(draw(2, 24, *KINDS[kind]))
    part.copy_(dense)
    weight, bias, rows = draw(24), draw(24), draw(2, 72)
    options = dict(zip(("scale", "shift", "row"), rows.chunk(3, dim=1), strict=True))
    totals = poisoned(dense), poisoned(dense)
    more = [{"residual": dense, "total": total} if summed else {} for total in totals]
    wanted = group_norm_silu(dense, weight, bias, 8, **options, **more[0])
    kept = norm_module.channels_last
    monkeypatch.setattr(norm_module, "channels_last", lambda x: pytest.fail("a copy") if x is part else kept(x))
    got = group_norm_silu(part, weight, bias, 8, **options, **more[1])
    assert torch.equal(got, wanted) and got.is_contiguous(memory_format=torch.channels_last)
    assert not summed or torch.equal(totals[1], totals[0])
    second = {name: value[1:] for name, value in options.items()}
    assert torch.equal(
        group_norm_silu(part[1:], weight, bias, 8, **second), group_norm_silu(dense[1:], weight, bias, 8, **second)
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_group_norm_in_place_of_what_it_reads(kind, draw):
    x, residual, weight, bias = last(draw(2, 24, *KINDS[kind])), last(draw(2, 24, *KINDS[kind])), draw(24), draw(24)
    wanted_total = x + residual
    wanted = group_norm_silu(x, weight, bias, 8, residual=residual)
    assert torch.equal(group_norm_silu(x, weight, bias, 8, residual=residual, total=residual, out=x), wanted)
    assert torch.equal(residual, wanted_total)


def test_group_norm_writes_any_layout(draw):
    x, weight, bias = draw(2, 24, 6, 6), draw(24), draw(24)
    wanted = group_norm_silu(last(x), weight, bias, 8)
    out, total = poisoned(x), poisoned(x)
    assert torch.equal(group_norm_silu(x, weight, bias, 8, out=out, total=total), wanted) and torch.equal(total, x)
    assert out.stride() == x.stride()


def test_a_workspace_is_used_and_its_size_is_checked(draw):
    x, weight, bias = last(draw(1, 24, 40, 40)), draw(24), draw(24)
    workspace = Workspace.on(x.device)
    workspace.counters.fill_(-12345)  # of any value
    workspace.moments.fill_(torch.nan)
    for _ in range(2):
        shared = group_norm_silu(x, weight, bias, 8, workspace=workspace)
        assert torch.equal(shared, group_norm_silu(x, weight, bias, 8))
    assert not workspace.moments.isnan().all()
    with pytest.raises(ShapeError, match="workspace"):
        group_norm_silu(x, weight, bias, 8, workspace=Workspace.on(x.device, 1, 1))


@pytest.mark.parametrize("chip", [Chip(80, 108), Chip(90, 132), Chip(120, 170)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_image_fills_the_chip_and_its_team_fits_it(chip, dtype):
    for channels, size in [(320, 64), (640, 32), (640, 64), (1280, 32), (320, 128)]:
        cut = norm_module.plan(channels, size * size, 32, dtype, chip)
        if cut.kind == "team":
            assert cut.blocks * cut.parts >= chip.multiprocessors / 2, (channels, size, cut)
            assert 2 <= cut.parts <= cut.resident and (cut.parts - 1) * cut.rows < size * size <= cut.parts * cut.rows
            default = Workspace.on("meta")
            assert cut.resident <= default.counters.numel()
            assert 2 * cut.resident * 3 * cut.constants["BLOCK_G"] <= default.moments.numel()


# Layer norm: one row, one channel, odd widths, a real one.
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (17, 320), (2, 9, 640), (5, 1281)], ids=str)
def test_layer_norm_is_as_accurate_as_torch(shape, dtype, mean, draw):
    x = (draw(*shape) + mean).to(dtype)
    weight, bias = draw(shape[-1], dtype=dtype), draw(shape[-1], dtype=dtype)
    out = poisoned(x)
    assert layer_norm(x, weight, bias, 1e-3, out=out) is out
    plain = reference.layer_norm(x, weight, bias, 1e-3)
    assert_no_worse_than(out, plain, reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-3))


def test_layer_norm_of_a_sum_without_parameters_and_of_any_strides(draw):
    x, residual = draw(6, 5, 40).transpose(0, 1), draw(5, 6, 80)[..., ::2]
    total = torch.full((5, 6, 40), torch.nan)
    fused = layer_norm(x, None, None, residual=residual, total=total)
    assert_no_worse_than(total, x + residual, x.double() + residual.double())
    plain, truth = (reference.layer_norm(value, None, None) for value in (total, total.double()))
    assert_no_worse_than(fused, plain, truth)
    strided = torch.full((5, 6, 80), torch.nan)[..., ::2]
    assert torch.equal(layer_norm(x, None, None, residual=residual, out=strided), fused)
    assert torch.equal(layer_norm(x[:2], None, None, residual=residual[:2]), fused[:2])  # whatever the batch


# GEGLU.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 5, 640), (33, 2562)], ids=str)
def test_geglu_is_as_accurate_as_torch(shape, dtype, draw):
    x = (4 * draw(*shape)).to(dtype)
    out = poisoned(x[..., : shape[-1] // 2].contiguous())
    assert geglu(x, out=out) is out
    assert_no_worse_than(out, reference.geglu(x), reference.geglu(x.double()))


def test_geglu_reads_rows_at_any_distance_and_saturates(draw):
    x = draw(7, 3, 40)[:, :2, :32] * 60
    truth = reference.geglu(x.double())
    assert_no_worse_than(geglu(x), reference.geglu(x), truth)
    strided = torch.full((7, 2, 32), torch.nan)[..., ::2]
    assert torch.equal(geglu(x, out=strided), geglu(x.contiguous()))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), width=st.integers(1, 70), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_norm_and_gate_of_any_size(rows, width, scale):
    generator = torch.Generator().manual_seed(rows * 100 + width)
    x = scale * torch.randn(rows, 2 * width, generator=generator)
    assert_no_worse_than(geglu(x), reference.geglu(x), reference.geglu(x.double()))
    plain, truth = (reference.layer_norm(value, None, None) for value in (x, x.double()))
    assert_no_worse_than(layer_norm(x, None, None), plain, truth)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 6), width=st.integers(1, 9), height=st.integers(2, 40), across=st.integers(1, 40),
    batch=st.integers(1, 2),
)  # fmt: skip
def test_group_norm_of_any_size(groups, width, height, across, batch):
    generator = torch.Generator().manual_seed(height * 100 + across)
    x = torch.randn(batch, groups * width, height, across, generator=generator)
    weight, bias = torch.randn(2, groups * width, generator=generator)
    fused = group_norm_silu(x, weight, bias, groups)
    truth = reference.group_norm_silu(x.double(), weight.double(), bias.double(), groups)
    assert_no_worse_than(fused, reference.group_norm_silu(x, weight, bias, groups), truth)


# Attention.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 24, 40, 64, 72, 80, 96, 128, 160])
def test_attention_reads_a_packed_projection_and_writes_where_it_is_told(width, dtype, draw):
    packed = draw(2, 70, 3 * 2 * width, dtype=dtype)
    q, k, v = (part.view(2, 70, 2, width).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    assert q.data_ptr() == packed.data_ptr() and not q.is_contiguous()
    out = torch.full((2, 70, 2, width), torch.nan, dtype=dtype, device=packed.device).transpose(1, 2)
    assert attention(q, k, v, out=out) is out
    truth = reference.attention(q.double(), k.double(), v.double())
    assert_no_worse_than(out, reference.attention(q, k, v), truth)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(queries=st.integers(1, 90), keys=st.integers(1, 200), width=st.integers(16, 90))
def test_attention_of_any_size(queries, keys, width):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q, k, v = (torch.randn(1, 2, n, width, generator=generator) for n in (queries, keys, keys))
    truth = reference.attention(q.double(), k.double(), v.double())
    assert_no_worse_than(attention(q, k, v), reference.attention(q, k, v), truth)


# Combine.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_combine_is_everything_between_two_evaluations(dtype, draw):
    """Guidance, estimate, DPM-Solver++ 2M's update, its history and the next input, each image by its own numbers."""
    x, past = draw(3, 4, 9, 7), draw(3, 4, 9, 7)
    both = draw(6, 4, 9, 7, dtype=dtype)  # the network's output: conditional images, then unconditional ones
    scale, c_skip, c_out, keep, now, before, c_in = draw(7, 3).double()
    none = torch.zeros_like(scale)
    denoised = [c_skip, c_out * scale, c_out * (1 - scale), none]
    moved = [now * term for term in denoised]
    moved = [moved[0] + keep, moved[1], moved[2], moved[3] + before]
    weights = torch.stack([torch.stack(terms, dim=1) for terms in (moved, denoised, [c_in * term for term in moved])])
    sums = Sums.of(weights.transpose(0, 1).float(), [(0, 1, 2, 3), (0, 1, 2), (0, 1, 2, 3)])
    registers, kinds = (x, both[:3], both[3:], past), (torch.float32, torch.float32, dtype)
    out = tuple(torch.full_like(x, torch.nan, dtype=kind) for kind in kinds)
    assert all(a is b for a, b in zip(combine(registers, sums, out=out), out, strict=True))

    truth = reference.combine(
        [register.double() for register in registers], Sums.of(sums.weights.double(), sums.active)
    )
    for results in zip(out, reference.combine(registers, sums, kinds), truth, strict=True):
        assert_no_worse_than(*results)
    image = 1  # and these are the numbers that were meant
    guided = both[4].double() + scale[image] * (both[1].double() - both[4].double())
    exact = c_skip[image] * x[image].double() + c_out[image] * guided
    step = keep[image] * x[image].double() + now[image] * exact + before[image] * past[image].double()
    torch.testing.assert_close(truth[1][image], exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(truth[2][image], c_in[image] * step, rtol=1e-4, atol=1e-4)


def test_combine_may_write_over_a_register(draw):
    x, other = draw(2, 3, 5, 5), draw(2, 3, 5, 5)
    sums = Sums.of(draw(1, 1, 2), [(0, 1)], mixed=False)
    wanted = combine((x, other), sums)[0]
    assert combine((x, other), sums, out=(x,))[0] is x and torch.equal(x, wanted)


# The public edge.
def test_what_does_not_fit_is_named(draw):
    x, vector, empty = draw(2, 6, 4, 4), draw(6), draw(0, 6, 4, 4)
    with pytest.raises(ShapeError, match="not empty"):
        group_norm_silu(empty, vector, vector, 3)
    with pytest.raises(ShapeError, match="not empty"):
        layer_norm(draw(0, 6), vector, vector)
    with pytest.raises(ShapeError, match="not empty"):
        geglu(draw(0, 6))
    with pytest.raises(ShapeError, match="not empty"):
        attention(*[draw(0, 1, 4, 16)] * 3)
    with pytest.raises(ShapeError, match="not empty"):
        combine([empty], Sums.of(draw(1, 1, 1), [(0,)]))
    with pytest.raises(ShapeError, match="residual"):
        group_norm_silu(x, vector, vector, 3, residual=x.half())
    with pytest.raises(ShapeError, match="row"):
        group_norm_silu(x, vector, vector, 3, row=vector)
    with pytest.raises(ShapeError, match="out"):
        layer_norm(x, None, None, out=x[:1])
    with pytest.raises(ShapeError, match="weight"):
        layer_norm(x, vector, None)
    with pytest.raises(ShapeError, match="contiguous"):
        layer_norm(x, None, None, total=x.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ShapeError, match="2 \\* I"):
        geglu(draw(3, 5))
    with pytest.raises(ShapeError, match="out"):
        geglu(draw(3, 6), out=draw(3, 6))
    with pytest.raises(ShapeError, match="out"):
        attention(*[draw(1, 1, 4, 16)] * 3, out=draw(1, 1, 4, 8))
    one = Sums.of(draw(1, 1, 1), [(0,)])
    with pytest.raises(ShapeError, match="dtypes"):
        combine([x], one, (torch.float64,))
    with pytest.raises(ShapeError, match="out 0"):
        combine([x], one, out=(last(x),))


def test_the_ops_handed_out_are_the_kernels():
    ops = triton_ops()
    assert ops.layer_norm is layer_norm and ops.geglu is geglu and ops.group_norm_silu is group_norm_silu
