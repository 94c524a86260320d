"""The one place where tolerances live."""

from __future__ import annotations

from math import floor, log2

import torch
from torch import Tensor


def assert_no_worse_than(fused: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """Fail unless ``fused`` is about as accurate as plain torch in the same dtype.

    The largest error of ``fused`` may be ``factor`` times the largest error of ``plain``, plus one unit in
    the last place of ``max|truth|``. The rule scales with the problem and leaves no number to tune.

    Args:
        fused: the result under test.
        plain: what plain torch makes of the same input in the same dtype, same shape.
        truth: the float64 result, same shape.
        factor: how much worse the fused result may be.

    Source: the rule of the flash-attention test suite (Dao et al. 2022, arXiv:2205.14135), against float64.
    """
    assert fused.shape == plain.shape == truth.shape, (fused.shape, plain.shape, truth.shape)
    assert fused.dtype == plain.dtype, (fused.dtype, plain.dtype)
    assert truth.dtype == torch.float64, truth.dtype
    largest = truth.abs().max().item()
    ulp = torch.finfo(fused.dtype).eps * 2.0 ** floor(log2(largest)) if largest > 0 else 0.0
    error = (fused.double() - truth).abs().max().item()
    allowed = factor * (plain.double() - truth).abs().max().item() + ulp
    # Written so that NaN on either side fails.
    assert error <= allowed, f"max error {error:.3g}, allowed {allowed:.3g}; one ulp at max|truth| is {ulp:.3g}"
