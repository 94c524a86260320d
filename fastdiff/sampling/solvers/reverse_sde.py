"""The time-reversed SDE in time itself: Euler-Maruyama, and a predictor with Langevin correctors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers.base import Row
from fastdiff.sampling.solvers.ddpm import DDPM


@dataclass(frozen=True)
class EulerMaruyama:
    """``dx = (f x - g^2 score) dt + g dw`` by Euler steps in t; no noise in a step to clean data.

    ``f = alpha' / alpha`` and ``g^2 = 2 sigma sigma' - 2 sigma^2 f`` follow from the path. Weak order 1. It cannot
    start where alpha is 0, for f is infinite there.

    Source: Anderson 1982; Song et al. 2020, arXiv:2011.13456, eq. 6, with sec. 3.4's drift and diffusion.
    """

    order: int = field(default=1, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        return tuple(self._row(path, i, t, s) for i, (t, s) in enumerate(pairwise(times)))

    def _row(self, path: Path, i: int, t: float, s: float) -> Row:
        alpha, sigma = path.alpha_sigma(t)
        if alpha == 0:
            raise PlanError(
                f"the time-reversed SDE has infinite drift at t={t!r}, where alpha is 0: start later, or use 'ddpm'"
            )
        alpha_rate, sigma_rate = path.rate(t)
        f = alpha_rate / alpha
        g2 = 2 * sigma * sigma_rate - 2 * sigma * sigma * f
        pull = (s - t) * g2 / sigma**2  # the score is (alpha D - x) / sigma^2
        weights = {"x": 1 + (s - t) * f + pull, "denoised": -pull * alpha}
        if path.alpha_sigma(s)[1] == 0:
            return Row(t, t, weights)
        return Row(t, t, weights | {"n1": math.sqrt(g2 * (t - s))}, draws=(i, None))


@dataclass(frozen=True)
class PredictorCorrector:
    """Ancestral steps, each followed by Langevin steps at the new noise level.

    The published step length ``2 (snr |z| / |score|)^2`` asks the score for its norm; here its expectation is used,
    ``|score| = |z| / sigma``, so that the step is known beforehand. Langevin steps of fixed length leave a bias of the
    order of ``snr^2`` that more steps do not remove.

    Source: Song et al. 2020, arXiv:2011.13456, algorithms 1, 4 and 5.

    Args:
        snr: signal-to-noise ratio of a Langevin step.
        corrector_steps: Langevin steps after each predictor step, one network call each.
    """

    snr: float = 0.16
    corrector_steps: int = 1
    order: int = field(default=0, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.snr < 1:
            raise PlanError(f"snr is {self.snr!r}; allowed: above 0 and below 1")
        if self.corrector_steps not in range(1, 11):
            raise PlanError(f"corrector_steps is {self.corrector_steps!r}; allowed: 1 to 10")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows: list[Row] = []
        draw = 0
        for predicted, s in zip(DDPM().rows(path, times), times[1:], strict=True):
            drawn = predicted.draws[0] is not None
            corrects = path.alpha_sigma(s)[1] > 0
            rows.append(predicted._replace(draws=(draw if drawn else None, None), ends=not corrects))
            draw += drawn
            for j in range(self.corrector_steps if corrects else 0):
                rows.append(self._langevin(path, s, draw, j == self.corrector_steps - 1))
                draw += 1
        return tuple(rows)

    def _langevin(self, path: Path, t: float, draw: int, ends: bool) -> Row:
        alpha, sigma = path.alpha_sigma(t)
        pull = 2 * self.snr**2  # step length over sigma^2
        weights = {"x": 1 - pull, "denoised": pull * alpha, "n1": 2 * self.snr * sigma}
        return Row(t, t, weights, ends=ends, draws=(draw, None))
