"""Keeping the denoised estimate inside the range of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.errors import PlanError


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding: D is clamped to a quantile ``s`` of its own absolute pixels, then divided by it.

    ``s`` is at least 1, so that an estimate inside [-1, 1] is left alone. Each image has its own.

    Args:
        ratio: which quantile, 0 to 1 (diffusers: ``dynamic_thresholding_ratio``).
        max_value: largest ``s`` (diffusers: ``sample_max_value``, where it is 1 unless given, which makes the method
            a plain clip).

    Raises:
        PlanError: if an option is out of range.

    Source: Saharia et al. 2022, Imagen, arXiv:2205.11487, sec. 2.3.
    """

    ratio: float = 0.995
    max_value: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise PlanError(f"ratio is {self.ratio!r}; allowed: above 0, up to 1")
        if not self.max_value >= 1:
            raise PlanError(f"max_value is {self.max_value!r}; allowed: 1 or more")


Clip = float | DynamicThreshold


def bounds(clip: Clip | None) -> tuple[float, float]:
    """Return the two numbers of a table row: the bound, and the share of pixels above a dynamic threshold (-1: none).

    Raises:
        PlanError: if the bound of a plain clip is no positive number.
    """
    if clip is None:
        return math.inf, -1.0
    if isinstance(clip, DynamicThreshold):
        return clip.max_value, 1 - clip.ratio
    if isinstance(clip, bool) or not isinstance(clip, float | int) or not (math.isfinite(clip) and clip > 0):
        raise PlanError(f"clip is {clip!r}; allowed: a finite number above 0, a DynamicThreshold, or none")
    return float(clip), -1.0


def clipped(x: Tensor, bound: Tensor) -> Tensor:
    """Clamp ``x [B, C, H, W]`` to ``[-bound, bound]``, bound ``[B, 1, 1, 1]``."""
    return torch.maximum(torch.minimum(x, bound), -bound)


def thresholded(x: Tensor, bound: Tensor, tail: Tensor, most: float) -> Tensor:
    """Threshold each image by a quantile of its own, or clip it.

    Args:
        x: ``[B, C, H, W]``.
        bound: largest threshold, or the bound of a plain clip, ``[B, 1, 1, 1]``.
        tail: share of the pixels above the quantile, ``[B, 1, 1, 1]``; below 0 the image is clipped.
        most: largest tail of the batch. A host number: only so many of the largest pixels are sorted.
    """
    last = x.shape[1] * x.shape[2] * x.shape[3] - 1
    kept = min(int(most * last) + 2, last + 1)
    largest = x.abs().flatten(1).topk(kept).values  # falling
    place = tail.flatten(1).clamp_min(0) * last
    below = place.floor()
    after = (below.long() + 1).clamp_max(kept - 1)
    quantile = torch.lerp(
        torch.take_along_dim(largest, below.long(), 1), torch.take_along_dim(largest, after, 1), place - below
    )
    threshold = torch.minimum(quantile[:, :, None, None].clamp_min(1), bound)
    dynamic = tail >= 0
    return clipped(x, torch.where(dynamic, threshold, bound)) / torch.where(dynamic, threshold, 1)
