"""Starting from a given image, whole (image to image) or in part (inpainting)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import PlanError, ShapeError
from fastdiff.sampling.denoiser import Denoiser, Estimates, Prepared
from fastdiff.sampling.grid import Times
from fastdiff.sampling.path import Path
from fastdiff.sampling.table import RowPlan, Rows


class Known(NamedTuple):
    """What is known of the state outside the mask."""

    noise: Tensor  # [B, C, H, W], the draw that the walk starts from
    levels: Tensor  # [R, 3]: alpha, sigma, and 1 where the state is left as it is

    @classmethod
    def of(cls, path: Path, times: Sequence[float], noise: Tensor, free_start: bool) -> Known:
        """Make it for rows at ``times``; ``free_start``: the first one starts from noise alone."""
        levels = [[*path.alpha_sigma(t), float(free_start and i == 0)] for i, t in enumerate(times)]
        return cls(noise, torch.tensor(levels, dtype=torch.float32, device=noise.device))

    def shown(self, x: Tensor, image: Tensor, mask: Tensor, row_index: Tensor) -> Tensor:
        """The state ``x [B, C, H, W]`` with what is known put in."""
        alpha, sigma, free = self.levels[row_index, :, None, None, None].unbind(1)
        return (alpha * image + sigma * self.noise).lerp(x, torch.maximum(mask, free))


class Inpaint:
    """A denoiser that knows the answer outside the mask.

    Every solver is a weighted sum of estimates and noise. With the true image as the estimate outside the mask, the
    state there is the forward process of that image, and the last step to clean data lands on it exactly, whatever
    the solver, its history and its noise.

    Args:
        denoise: gives the estimate inside the mask.
        image: ``[B, C, H, W]`` float32, clean.
        mask: ``[B, 1, H, W]`` float32 in [0, 1]: 1 where to paint, 0 where to keep.
        known: also show the network the image noised by one draw outside the mask, at every row, as diffusers does;
            it differs where solvers add noise, and where the walk starts from noise alone.

    Source: Lugmayr et al. 2022, RePaint, arXiv:2201.09865, eq. 8, stated for the estimate instead of the state.
    """

    def __init__(self, denoise: Denoiser, image: Tensor, mask: Tensor, known: Known | None = None):
        self.denoise, self.image, self.mask, self.known = denoise, image, mask, known

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        plan: RowPlan,
        prepared: Prepared,
        momentum: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> Estimates:
        """See ``Denoiser``."""
        if self.known is not None:
            x = self.known.shown(x, self.image, self.mask, rows.row_index)
        found = self.denoise(x, rows, plan, prepared, momentum, deep)
        denoised = self.image.lerp(found.denoised, self.mask)
        raw = denoised if found.raw is found.denoised else self.image.lerp(found.raw, self.mask)
        spread = None if found.spread is None else (found.spread - 1) * self.mask + 1
        return found._replace(denoised=denoised, raw=raw, spread=spread)

    def restored(self, x: Tensor) -> Tensor:
        """``x [B, C, H, W]`` with the image itself outside the mask."""
        return self.image.lerp(x, self.mask)


def shorten(times: Times, strength: float) -> Times:
    """Keep the last ``strength`` of the steps: diffusers' ``strength`` of image to image.

    Raises:
        PlanError: if no step is left, or strength is out of range.
    """
    steps = len(times) - 1
    if not 0 < strength <= 1:
        raise PlanError(f"strength is {strength!r}; allowed: above 0, up to 1")
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise PlanError(f"strength {strength!r} of {steps} steps is less than one step; allowed: {1 / steps:g} to 1")
    return times[steps - kept :]


def noised(path: Path, image: Tensor, noise: Tensor, t: float) -> Tensor:
    """The forward process at ``t``: ``alpha x0 + sigma z``, each ``[B, C, H, W]``."""
    alpha, sigma = path.alpha_sigma(t)
    return alpha * image + sigma * noise


def check_image(name: str, image: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``ShapeError`` unless ``image`` has this shape and finite values."""
    if tuple(image.shape) != shape:
        raise ShapeError(f"{name} is {tuple(image.shape)}; needed: {shape}")
    if not bool(image.isfinite().all()):
        raise ShapeError(f"{name} holds NaN or infinity; allowed are finite numbers")
