"""Networks that estimate the clean image, the noise, or a mix of the two, at one time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction.base import Coefficients, Target, need_noise, need_signal, one_time


@dataclass(frozen=True)
class Eps:
    """The noise z. Source: Ho et al. 2020, arXiv:2006.11239, eq. 14."""

    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = need_signal("eps", path, t)
        return Coefficients(1.0, 1 / alpha, -sigma / alpha, *one_time(path, t))

    def target(self, path: Path, t: float) -> Target:
        return Target(0.0, 1.0)


@dataclass(frozen=True)
class X0:
    """The clean image. Source: Salimans and Ho 2022, arXiv:2202.00512, sec. 4."""

    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        return Coefficients(1.0, 0.0, 1.0, *one_time(path, t))

    def target(self, path: Path, t: float) -> Target:
        return Target(1.0, 0.0)


@dataclass(frozen=True)
class V:
    """``v = alpha * z - sigma * x0``. Source: Salimans and Ho 2022, arXiv:2202.00512, app. D, for any path."""

    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = path.alpha_sigma(t)
        norm = alpha * alpha + sigma * sigma
        return Coefficients(1.0, alpha / norm, -sigma / norm, *one_time(path, t))

    def target(self, path: Path, t: float) -> Target:
        alpha, sigma = path.alpha_sigma(t)
        return Target(-sigma, alpha)


@dataclass(frozen=True)
class Score:
    """The score ``grad log p_t(x)``, the conditional mean of ``-z / sigma``.

    Source: Song et al. 2020, arXiv:2011.13456, eq. 7.

    The loss is weighted by sigma^2, the weighting of that paper, without which small sigma would drown the rest.
    """

    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = need_signal("score", path, t)
        return Coefficients(1.0, 1 / alpha, sigma * sigma / alpha, *one_time(path, t))

    def target(self, path: Path, t: float) -> Target:
        _, sigma = need_noise("the score", path, t)
        return Target(0.0, -1 / sigma, sigma * sigma)


@dataclass(frozen=True)
class Velocity:
    """``dx/dt = alpha' * x0 + sigma' * z``. Source: Lipman et al. 2022, arXiv:2210.02747, eq. 13 and 14."""

    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = path.alpha_sigma(t)
        alpha_rate, sigma_rate = _finite_rate(path, t)
        k = alpha_rate * sigma - sigma_rate * alpha
        return Coefficients(1.0, -sigma_rate / k, sigma / k, *one_time(path, t))

    def target(self, path: Path, t: float) -> Target:
        return Target(*_finite_rate(path, t))


def _finite_rate(path: Path, t: float) -> tuple[float, float]:
    alpha_rate, sigma_rate = path.rate(t)
    if not math.isfinite(sigma_rate):
        raise PlanError(f"the velocity of this path is infinite at t={t!r}: train and sample above it")
    return alpha_rate, sigma_rate


@dataclass(frozen=True)
class EDMPreconditioned:
    """EDM's preconditioned output, on any path through ``x / alpha``.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1.
    """

    sigma_data: float = 0.5
    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = need_signal("EDM's output", path, t)
        ratio, data = sigma / alpha, self.sigma_data
        total = ratio * ratio + data * data
        return Coefficients(
            1 / (alpha * total**0.5),
            data * data / (total * alpha),
            ratio * data / total**0.5,
            *one_time(path, t),
        )

    def target(self, path: Path, t: float) -> Target:
        alpha, sigma = need_noise("EDM's target", path, t)
        _, skip, out, _, _ = self.coefficients(path, t, t)
        return Target((1 - skip * alpha) / out, -skip * sigma / out)


def angle(path: Path, t: float, sigma_data: float) -> tuple[float, float, float]:
    """Return ``(scale, cos, sin)`` of a state on TrigFlow's circle: ``x / scale = cos * x0 + sin * sigma_data * z``.

    Source: Lu and Song 2024, arXiv:2410.11081, app. B: every path is this one after scaling.
    """
    alpha, sigma = path.alpha_sigma(t)
    scale = math.hypot(alpha, sigma / sigma_data)
    return scale, alpha / scale, sigma / sigma_data / scale


@dataclass(frozen=True)
class TrigPreconditioned:
    """TrigFlow's output: ``D = cos * x - sin * sigma_data * F(x / sigma_data)`` on the circle, on any path by scaling.

    On an EDM path this is EDM's output with the other sign (diffusers' ``v_prediction`` of its EDM schedulers), but
    it needs no signal, so it holds at pure noise too.

    Source: Lu and Song 2024, arXiv:2410.11081, sec. 3.1.
    """

    sigma_data: float = 0.5
    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        scale, cos, sin = angle(path, t, self.sigma_data)
        data = self.sigma_data
        return Coefficients(1 / (data * scale), cos / scale, -sin * data, *one_time(path, t))

    def target(self, path: Path, t: float) -> Target:
        _, cos, sin = angle(path, t, self.sigma_data)
        return Target(-sin / self.sigma_data, cos)
