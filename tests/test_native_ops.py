"""The CPU runtime's ops against float64: error at most twice plain torch's own; Winograd's by its own known loss."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_runtime import runtime_or_skip
from torch import Tensor

from fastdiff.kernels import reference, winograd
from fastdiff.kernels.native import ADD, ATTENTION, CONV, LAYER_NORM, NORM, RESAMPLE, Op, Runtime

pytestmark = pytest.mark.fast
FLOOR = 2e-7  # of a relative error: two roundings; below it there is nothing to compare
WINOGRAD = {2: 1e-6, 4: 1e-5}


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return runtime_or_skip()


def run(runtime: Runtime, kind: int, tensors: dict[str, Tensor], threads: int = 2, **fields: Any) -> Tensor:
    """One op over tensors by slot name; the result is the tensor ``out``."""
    names = list(tensors)
    op = Op(kind=kind, **{name: i for i, name in enumerate(names)}, **fields)
    slots = (ctypes.c_void_p * len(names))(*(tensors[name].data_ptr() for name in names))
    scratch = runtime.scratch([op], threads)
    runtime.run(ctypes.addressof(op), 1, slots, scratch.data_ptr(), threads, None)
    return tensors["out"]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def pixels(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, H, W, C]``, dense."""
    return x.permute(0, 2, 3, 1).contiguous()


def convolved(
    runtime: Runtime, sources: list[Tensor], weight: Tensor, bias: Tensor | None = None, *, algorithm: int = 0,
    packed: bool = False, stride: int = 1, pad: int = 1, size: tuple[int, int] | None = None, silu: bool = False,
    stats: Tensor | None = None, row: Tensor | None = None, residual: Tensor | None = None, gated: bool = False,
    threads: int = 2,
) -> Tensor:  # fmt: skip
    """The op on ``[B, C, H, W]`` tensors."""
    dense = [pixels(x) for x in sources]
    batch, sh, sw, _ = dense[0].shape
    kernel, n = weight.shape[-1], weight.shape[0] // (2 if gated else 1)
    vh, vw = size or (sh, sw)
    h, w = ((v + (2 * pad if pad else kernel // 2) - kernel) // stride + 1 for v in (vh, vw))
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1).contiguous()
    out = torch.full((batch, h, w, n), float("nan"))
    tensors = {"src0": dense[0], "weight": matrix, "out": out, "src1": dense[-1], "bias": bias, "stats": stats,
               "row": row, "residual": None if residual is None else pixels(residual)}  # fmt: skip
    if len(dense) == 1:
        tensors["src1"] = None
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    channels = [x.shape[-1] for x in dense] + [0]
    fields = {
        "algorithm": algorithm, "packed": packed, "B": batch, "H": h, "W": w, "VIEW_H": vh, "VIEW_W": vw, "SH": sh,
        "SW": sw, "C0": channels[0], "C1": channels[1], "N": n, "ld0": channels[0], "ld1": channels[1], "ldo": n,
        "ldr": n, "kernel": kernel, "stride": stride, "pad": pad, "silu": silu, "gated": gated,
        "affine": stats is not None, "row_stride": 0 if row is None else row.shape[1],
    }  # fmt: skip
    if packed:
        given["weight"] = runtime.pack(Op(kind=CONV, **fields), matrix, threads)
    return run(runtime, CONV, given, threads, **fields).permute(0, 3, 1, 2)


def within(got: Tensor, plain: Tensor, exact: Tensor, algorithm: int = 0) -> None:
    if algorithm:
        assert error(got, exact) <= WINOGRAD[algorithm]
    else:
        assert error(got, exact) <= max(2 * error(plain, exact), FLOOR)


SHAPES = [(1, 8, 8, 32, 32), (2, 7, 9, 48, 40), (1, 16, 16, 64, 4), (1, 13, 4, 16, 100), (3, 5, 5, 3, 33),
          (1, 1, 1, 16, 16), (2, 3, 40, 32, 70), (5, 4, 4, 512, 16)]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "algorithm"), [(shape, a) for shape in SHAPES for a in (0, 2, 4) if not a or shape[3] % 16 == 0], ids=str
)
def test_a_convolution_with_everything_around_it(runtime, shape, algorithm):
    batch, h, w, c, n = shape
    x, weight, bias = torch.randn(batch, c, h, w), torch.randn(n, c, 3, 3) / c, torch.randn(n)
    stats, row, residual = torch.randn(batch, 2, c), torch.randn(batch, n + 3), torch.randn(batch, n, h, w)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, row: Tensor, residual: Tensor) -> Tensor:
        y = F.silu(x * stats[:, 0, :, None, None] + stats[:, 1, :, None, None])
        return F.conv2d(y, weight, bias, padding=1) + row[:, :n, None, None] + residual

    given = (x, weight, bias, stats, row, residual)
    exact = plain(*(t.double() for t in given))
    options = {"algorithm": algorithm, "silu": True, "stats": stats, "row": row, "residual": residual}
    got = convolved(runtime, [x], weight, bias, **options)
    within(got, plain(*given), exact, algorithm)
    # prepared weights and the number of threads change no bit, and neither does the company in the batch
    assert torch.equal(got, convolved(runtime, [x], weight, bias, packed=True, **options))
    assert torch.equal(got, convolved(runtime, [x], weight, bias, threads=1, **options))
    alone = {"stats": stats[-1:], "row": row[-1:], "residual": residual[-1:]}
    assert torch.equal(got[-1:], convolved(runtime, [x[-1:]], weight, bias, **(options | alone)))


@pytest.mark.parametrize("algorithm", [0, 2, 4])
@pytest.mark.parametrize("size", [(14, 18), (8, 11), (7, 9)], ids=str)
def test_a_convolution_of_two_sources_that_are_enlarged_first(runtime, size, algorithm):
    a, b, weight = torch.randn(2, 32, 7, 9), torch.randn(2, 16, 7, 9), torch.randn(24, 48, 3, 3) / 48

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return reference.upsample_conv(x, weight, None, size)

    joined = torch.cat([a, b], dim=1)
    got = convolved(runtime, [a, b], weight, algorithm=algorithm, size=size)
    within(got, plain(joined, weight), plain(joined.double(), weight.double()), algorithm)


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("size", [(8, 8), (9, 6)], ids=str)
def test_stride_two(runtime, size, pad):
    x, weight, bias = torch.randn(2, 24, *size), torch.randn(40, 24, 3, 3), torch.randn(40)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x if pad else F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2, padding=pad)

    got = convolved(runtime, [x], weight, bias, stride=2, pad=pad)
    within(got, plain(x, weight, bias), plain(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("widths", [(320, 48), (17, 5), (1100, 16)], ids=str)
def test_a_gated_layer(runtime, widths, packed):
    c, n = widths
    x, weight, bias = torch.randn(3, c, 5, 3), torch.randn(2 * n, c, 1, 1) / c**0.5, torch.randn(2 * n)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        value, gate = F.conv2d(x, weight, bias).chunk(2, dim=1)
        return value * F.gelu(gate)

    got = convolved(runtime, [x], weight, bias, pad=0, gated=True, packed=packed)
    within(got, plain(x, weight, bias), plain(x.double(), weight.double(), bias.double()))


def test_not_a_number_stays_where_it_is(runtime):
    """A NaN or infinity in one image of a batch reaches no other."""
    x, weight = torch.randn(3, 32, 8, 8), torch.randn(16, 32, 3, 3)
    clean = {a: convolved(runtime, [x], weight, algorithm=a) for a in (0, 2, 4)}
    x[1, 3, 4, 4] = float("nan")
    for algorithm, before in clean.items():
        got = convolved(runtime, [x], weight, algorithm=algorithm)
        assert torch.isnan(got[1]).any()
        assert torch.equal(got[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(
    "shape", [(2, 32, 16, 16, 8), (1, 48, 3, 5, 4), (1, 320, 40, 40, 32), (2, 12, 1, 1, 3)], ids=str
)
def test_group_norm(runtime, shape, mean):
    batch, c, h, w, groups = shape
    x, weight, bias = torch.randn(batch, c, h, w) + mean, torch.randn(c), torch.randn(c)
    row = torch.randn(batch, 2 * c)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, row: Tensor) -> Tensor:
        scale, shift = row.chunk(2, dim=1)
        return reference.group_norm_silu(x, weight, bias, groups, 1e-5, scale=scale, shift=shift, silu=False)

    stats = torch.empty(batch, 2, c)
    run(
        runtime, NORM, {"src0": pixels(x), "weight": weight, "bias": bias, "row": row, "out": stats}, B=batch, H=h, W=w,
        SH=h, SW=w, C0=c, ld0=c, groups=groups, eps=1e-5, row_stride=2 * c,
    )  # fmt: skip
    got = x.double() * stats[:, 0, :, None, None].double() + stats[:, 1, :, None, None].double()
    exact = plain(*(t.double() for t in (x, weight, bias, row)))
    within(got, plain(x, weight, bias, row), exact)


@pytest.mark.parametrize("c", [16, 40, 320, 7])
def test_layer_norm(runtime, c):
    x, weight, bias = 3 * torch.randn(2, c, 3, 5) + 1, torch.randn(c), torch.randn(c)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (c,), weight, bias, 1e-5)

    out = torch.empty(2, 3, 5, c)
    run(
        runtime, LAYER_NORM, {"src0": pixels(x), "weight": weight, "bias": bias, "out": out}, B=2, H=3, W=5, C0=c,
        ld0=c, ldo=c, eps=1e-5,
    )  # fmt: skip
    within(out, plain(x, weight, bias), plain(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("shape", [(1, 5, 7, 1, 8), (2, 64, 64, 3, 24), (1, 100, 1500, 2, 40), (3, 33, 77, 4, 160),
                                   (1, 16, 16, 2, 3)], ids=str)  # fmt: skip
def test_attention(runtime, shape, layout):
    batch, queries, keys, heads, d = shape
    q = torch.randn(batch, queries, heads * d)
    if layout == "tokens":  # what a linear layer gives
        k, v = (torch.randn(batch, keys, heads, d).transpose(1, 2) for _ in range(2))
    else:
        k, v = (torch.randn(batch, heads, keys, d) for _ in range(2))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = q.view(batch, queries, heads, d).transpose(1, 2)
        return F.scaled_dot_product_attention(split, k, v).transpose(1, 2).reshape(q.shape)

    out = torch.empty_like(q)
    run(
        runtime, ATTENTION, {"src0": q, "src1": k, "weight": v, "out": out}, B=batch, N=heads * d, heads=heads,
        L=queries, M=keys, ld0=heads * d, ldo=heads * d, batch_k=k.stride(0), head_k=k.stride(1), ldk=k.stride(2),
    )  # fmt: skip
    within(out, plain(q, k, v), plain(q.double(), k.double(), v.double()))


def test_large_logits_do_not_overflow(runtime):
    q = torch.full((1, 4, 8), 60.0)
    k, v = torch.full((1, 1, 6, 8), 60.0), torch.randn(1, 1, 6, 8)
    k[..., 3, :] = -60
    out = torch.empty_like(q)
    run(
        runtime, ATTENTION, {"src0": q, "src1": k, "weight": v, "out": out}, B=1, N=8, heads=1, L=4, M=6, ld0=8, ldo=8,
        batch_k=48, head_k=48, ldk=8,
    )  # fmt: skip
    exact = F.scaled_dot_product_attention(q[:, None].double(), k.double(), v.double())[:, 0]
    assert error(out, exact) < 1e-6


@pytest.mark.parametrize("size", [(4, 3), (16, 12), (8, 6)], ids=str)
def test_resampling(runtime, size):
    x, more = torch.randn(2, 24, 8, 6), torch.randn(2, 8, 8, 6)
    joined = torch.cat([x, more], dim=1)
    expected = F.avg_pool2d(joined, 2) if size == (4, 3) else F.interpolate(joined, size=size, mode="nearest")
    out = torch.empty(2, *size, 32)
    run(
        runtime, RESAMPLE, {"src0": pixels(x), "src1": pixels(more), "out": out}, B=2, H=size[0], W=size[1], SH=8,
        SW=6, C0=24, ld0=24, C1=8, ld1=8, ldo=32,
    )  # fmt: skip
    assert torch.allclose(out.permute(0, 3, 1, 2), expected, atol=1e-6)


def test_addition(runtime):
    a, b, out = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7), torch.empty(2, 3, 5, 7)
    run(runtime, ADD, {"src0": a, "residual": b, "out": out}, B=2, H=3, W=5, C0=7, ld0=7, ldr=7, ldo=7)
    assert torch.equal(out, a + b)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 2)], ids=str)
def test_winograd_in_plain_torch_is_the_convolution(m, size):
    x, weight, bias = torch.randn(2, 5, *size).double(), torch.randn(3, 5, 3, 3).double(), torch.randn(3).double()
    got = winograd.conv3x3(x, weight, bias, m)
    assert torch.allclose(got, F.conv2d(x, weight, bias, padding=1), atol=1e-12)


@pytest.mark.parametrize("m", [2, 4])
def test_the_runtime_does_what_its_twin_does(runtime, m):
    x, weight = torch.randn(2, 32, 9, 10), torch.randn(24, 32, 3, 3) / 32
    got = convolved(runtime, [x], weight, algorithm=m)
    assert error(got, winograd.conv3x3(x, weight, None, m).double()) < WINOGRAD[m]


def test_an_unknown_tile_is_refused():
    with pytest.raises(ValueError, match="tile is 3; allowed: 2, 4"):
        winograd.matrices(3, torch.zeros(1))
