"""DDIM with eta, and its clipped form. On the straight and the EDM path eta = 0 is Euler's method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers.base import Row, ddim_weights


@dataclass(frozen=True)
class DDIM:
    """Source: Song et al. 2020, arXiv:2010.02502, eq. 12 and 16.

    Args:
        eta: share of fresh noise, 0 (deterministic) to 1 (ancestral).
        keep_noise: where D is clipped, take the noise direction from the unclipped estimate (as diffusers does unless
            ``use_clipped_model_output``) instead of re-deriving it from the clipped one.
    """

    eta: float = 0.0
    keep_noise: bool = False
    order: int = field(default=1, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise PlanError(f"eta is {self.eta!r}; allowed: 0 to 1")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        return tuple(self._row(path, i, t, s) for i, (t, s) in enumerate(pairwise(times)))

    def _row(self, path: Path, i: int, t: float, s: float) -> Row:
        weights = ddim_weights(path, t, s, self.eta)
        if self.keep_noise:
            # x_s = alpha_s * D + kept * (x - alpha_t * raw): the same sum, with D split by its two roles
            alpha_s = path.alpha_sigma(s)[0]
            weights["raw"] = weights["denoised"] - alpha_s
            weights["denoised"] = alpha_s
        return Row(t, t, weights, draws=(i if "n1" in weights else None, None))


def euler_ancestral(eta: float = 1.0) -> DDIM:
    """Euler with ancestral noise: on every path the DDIM step with ``eta``, here 1 unless given.

    Source: Karras et al. 2022, k-diffusion's ``sample_euler_ancestral``, whose step is eq. 12 of arXiv:2010.02502.
    """
    return DDIM(eta)
