"""Who computes attention: by a table, for reasons that can be read."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastdiff.errors import PlanError  # noqa: E402
from fastdiff.kernels import dispatch, reference  # noqa: E402
from fastdiff.kernels.choices import ATTENTION  # noqa: E402

HALF = torch.float16


def test_without_a_measurement_torch_decides():
    choice = dispatch.choose(4096, 4096, 40, HALF, 90)
    assert choice.by == "sdpa" and "no measurement for 4k_40 in torch.float16" in choice.why


def test_a_row_decides_for_its_chip_class_and_kind_alone():
    table = {(90, "4k_40", "half"): ("triton", "0.8 of flash"), (90, "cross_40", "half"): ("cudnn", "0.9 of flash")}
    assert dispatch.choose(4096, 4096, 40, HALF, 90, table) == ("triton", "0.8 of flash")
    assert dispatch.choose(2048, 2048, 40, torch.bfloat16, 90, table).by == "triton"
    assert dispatch.choose(4096, 77, 40, HALF, 90, table).by == "cudnn"
    for other in [(1024, 1024, 40, HALF, 90), (4096, 4096, 64, HALF, 90), (4096, 4096, 40, HALF, 89)]:
        assert dispatch.choose(*other, table).by == "sdpa"
    assert dispatch.choose(4096, 4096, 40, torch.float32, 90, table).by == "sdpa"


@pytest.mark.parametrize(
    "L, M, d, kind", [(1, 77, 64, "cross_64"), (256, 256, 160, "1k_160"), (9216, 9216, 40, "16k_40")]
)
def test_shape_classes(L, M, d, kind):
    assert dispatch.shape_class(L, M, d) == kind


def test_a_table_that_names_nobody_is_refused_and_a_head_we_cannot_take_is_torchs():
    with pytest.raises(PlanError, match="'best'; allowed: triton, sdpa"):
        dispatch.choose(256, 256, 64, HALF, 90, {(90, "1k_64", "half"): ("best", "")})
    table = {(90, "1k_512", "half"): ("triton", "")}
    assert dispatch.choose(256, 256, 512, HALF, 90, table).by == "sdpa"


@pytest.mark.parametrize("by", ["triton", "sdpa"])
def test_attention_follows_the_table_and_writes_where_it_is_told(by, device, draw):
    q, k, v = (draw(1, 2, 20, 32) for _ in range(3))
    architecture = dispatch.architecture_of(q)
    attention = dispatch.attention_from({(architecture, "cross_32", "float"): (by, "for the test")})
    out = torch.full_like(q, torch.nan)
    assert attention(q, k, v, out=out) is out
    torch.testing.assert_close(out, reference.attention(q, k, v), rtol=1e-4, atol=1e-5)
    assert torch.equal(attention(q, k, v), out)


@pytest.mark.parametrize("by", [name for name in dispatch.CANDIDATES if name != "triton"])
def test_torchs_backends_are_called_as_they_are_declared(by):
    """On the meta device, which checks arguments and shapes and computes nothing."""
    q, k = (torch.empty(2, 8, length, 64, device="meta", dtype=HALF) for length in (96, 77))
    assert dispatch.CANDIDATES[by](q, k, k).shape == q.shape


def test_the_shipped_table_names_only_what_there_is():
    for (architecture, kind, precision), (by, why) in ATTENTION.items():
        assert by in dispatch.CANDIDATES and why and precision in ("half", "float")
        assert architecture >= 80 and "_" in kind
