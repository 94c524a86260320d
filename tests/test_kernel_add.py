"""The fused addition against its twin, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tolerances import assert_no_worse_than  # noqa: E402

from fastdiff.errors import ShapeError  # noqa: E402
from fastdiff.kernels import add as module  # noqa: E402
from fastdiff.kernels import reference  # noqa: E402

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 4, 4, 320), (2, 16, 9, 48)]
GIVEN = ["", "bias", "residual", "bias residual"]


def parts(shape, given, dtype, device):
    draw = torch.Generator().manual_seed(len(given))
    sizes = {"bias": shape[3:], "residual": shape}
    made = {name: torch.randn(size, generator=draw).to(device, dtype) for name, size in sizes.items()}
    x = torch.randn(shape, generator=draw).to(device, dtype)
    return x, *(made[name] if name in given.split() else None for name in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape, given, dtype, device):
    arguments = parts(shape, given, dtype, device)
    wide = [None if t is None else t.double() for t in arguments]
    got = module.add(*arguments)
    assert_no_worse_than(got, reference.add(*arguments), reference.add(*wide))


def test_reads_and_writes_parts_of_wider_pixels_and_nothing_else(device):
    shape = (2, 3, 5, 24)
    x, bias, residual = parts(shape, "bias residual", torch.float32, device)
    wide = torch.full((2, 3, 5, 40), torch.nan, device=device)
    before = torch.full_like(wide, torch.nan)
    before[..., 3:27] = residual
    out = module.add(x, bias, before[..., 3:27], wide[..., 8:32])
    assert out.data_ptr() == wide[..., 8:32].data_ptr()
    assert torch.equal(wide[..., 8:32], module.add(x, bias, residual))
    assert wide[..., :8].isnan().all() and wide[..., 32:].isnan().all()


def test_an_image_does_not_depend_on_its_company(device):
    arguments = parts((3, 4, 4, 320), "bias residual", torch.float16, device)
    x, bias, residual = arguments
    assert torch.equal(module.add(*arguments)[1:2], module.add(x[1:2], bias, residual[1:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_does_not_fit_is_named(dtype, device):
    x, bias, residual = parts((2, 3, 5, 24), "bias residual", dtype, device)
    for wrong, message in (
        ((x[0], bias, residual), r"x \(3, 5, 24\)"),
        ((x, bias[1:], residual), r"bias \(23,\).*allowed: \(24,\)"),
        ((x, bias.double(), residual), "bias .*float64"),
        ((x, bias, residual[..., :8]), "residual"),
        ((x, bias, residual.transpose(1, 2).contiguous().transpose(1, 2)), "residual has strides"),
        ((x, bias, residual, x[:1]), "out"),
    ):
        with pytest.raises(ShapeError, match=message):
            module.add(*wrong)


def test_no_pixels_are_no_work(device):
    x, bias, _ = parts((2, 3, 5, 24), "bias", torch.float32, device)
    assert module.add(x[:0], bias, None).shape == (0, 3, 5, 24)
