"""Ancestral sampling of the discrete reverse process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers.base import Row

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


@dataclass(frozen=True)
class DDPM:
    """Source: Ho et al. 2020, arXiv:2006.11239, eq. 6, 7 and sec. 3.2, for any alpha, sigma and any step length.

    Args:
        variance: ``"fixed_small"`` (the posterior's), ``"fixed_large"`` (the forward step's) or ``"learned_range"``:
            between the two in its logarithm, pixel by pixel, where the second half of the network's ``2C`` output
            channels says (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15).
    """

    variance: str = "fixed_small"
    order: int = field(default=1, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.variance not in VARIANCES:
            raise PlanError(f"variance is {self.variance!r}; allowed: {', '.join(map(repr, VARIANCES))}")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        return tuple(self._row(path, i, t, s) for i, (t, s) in enumerate(pairwise(times)))

    def _row(self, path: Path, i: int, t: float, s: float) -> Row:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        ratio = alpha_t / alpha_s
        forward = sigma_t**2 - (ratio * sigma_s) ** 2  # variance of q(x_t | x_s)
        weights = {"x": ratio * sigma_s**2 / sigma_t**2, "denoised": alpha_s * forward / sigma_t**2}
        if sigma_s == 0:  # the last step lands on data; the published algorithm adds no noise there
            return Row(t, t, weights)
        large = self.variance == "fixed_large"
        weights["n1"] = math.sqrt(max(forward, 0.0)) * (1.0 if large else sigma_s / sigma_t)
        learned = 0.5 * math.log(sigma_t / sigma_s) if self.variance == "learned_range" else 0.0
        return Row(t, t, weights, draws=(i, None), learned=learned)
