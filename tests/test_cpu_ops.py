"""The CPU ops are as accurate as torch's own, against float64, and give way where they do not fit."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_no_worse_than

from fastdiff.kernels import CPU, REFERENCE


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 6, 5, 7), (1, 64, 16, 16)], ids=str)
def test_doubling_and_convolving_is_as_accurate_as_torch(draw, shape, bias):
    x = draw(*shape).contiguous(memory_format=torch.channels_last)
    weight, offset = draw(9, shape[1], 3, 3), draw(9) if bias else None
    size = (2 * shape[2], 2 * shape[3])
    truth = REFERENCE.upsample_conv(x.double(), weight.double(), None if offset is None else offset.double(), size)
    got = CPU.upsample_conv(x, weight, offset, size)
    assert_no_worse_than(got, REFERENCE.upsample_conv(x, weight, offset, size), truth)
    assert got.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_other_enlargements_go_the_plain_way(draw):
    x, weight = draw(1, 3, 4, 5), draw(2, 3, 3, 3)
    for size in ((7, 9), (8, 9)):
        assert torch.equal(CPU.upsample_conv(x, weight, None, size), REFERENCE.upsample_conv(x, weight, None, size))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 77, 40), (2, 256, 320)], ids=str)
def test_linear_is_as_accurate_as_torch(draw, shape):
    x, weight, bias = draw(*shape), draw(33, shape[-1]), draw(33)
    truth = REFERENCE.linear(x.double(), weight.double(), bias.double())
    assert_no_worse_than(CPU.linear(x, weight, bias), REFERENCE.linear(x, weight, bias), truth)
    assert CPU.linear(x.double(), weight.double(), None).dtype == torch.float64


def test_linear_has_gradients(draw):
    weight = draw(4, 3).requires_grad_()
    CPU.linear(draw(2, 3), weight, None).sum().backward()
    assert weight.grad is not None
