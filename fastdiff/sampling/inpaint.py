"""Starting from a given image, whole (image to image) or in part (inpainting)."""

from __future__ import annotations

from torch import Tensor

from fastdiff.errors import PlanError, ShapeError
from fastdiff.sampling.denoiser import Denoiser, Estimates, Prepared
from fastdiff.sampling.grid import Times
from fastdiff.sampling.path import Path
from fastdiff.sampling.table import RowPlan, Rows


class Inpaint:
    """A denoiser that knows the answer outside the mask.

    Every solver is a weighted sum of estimates and noise. With the true image as the estimate outside the mask, the
    state there is the forward process of that image, and the last step to clean data lands on it exactly, whatever
    the solver, its history and its noise.

    Args:
        denoise: gives the estimate inside the mask.
        image: ``[B, C, H, W]`` float32, clean.
        mask: ``[B, 1, H, W]`` float32 in [0, 1]: 1 where to paint, 0 where to keep.

    Source: Lugmayr et al. 2022, RePaint, arXiv:2201.09865, eq. 8, stated for the estimate instead of the state.
    """

    def __init__(self, denoise: Denoiser, image: Tensor, mask: Tensor):
        self.denoise, self.image, self.mask = denoise, image, mask

    def __call__(
        self, x: Tensor, rows: Rows, plan: RowPlan, prepared: Prepared, momentum: Tensor | None = None
    ) -> Estimates:
        """See ``Denoiser``."""
        found = self.denoise(x, rows, plan, prepared, momentum)
        denoised = self.image.lerp(found.denoised, self.mask)
        raw = denoised if found.raw is found.denoised else self.image.lerp(found.raw, self.mask)
        spread = None if found.spread is None else (found.spread - 1) * self.mask + 1
        return Estimates(denoised, raw, found.momentum, spread)


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
