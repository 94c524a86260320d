"""Paths that are the marginals of a stochastic differential equation in continuous time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.errors import PlanError
from fastdiff.sampling.path.base import check_time, noise_ratio, ratio, ratio_time, softplus


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """The Ornstein-Uhlenbeck process ``dx = -rate * x dt + sqrt(2 * rate) dw``, run for a time ``t_start``.

    Source: Song et al. 2020, arXiv:2011.13456, eq. 11 with a constant beta = 2 * rate.
    """

    decay: float = 1.0
    t_start: float = 5.0
    t_end: float = 0.0
    t_min: float = 0.001

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        return math.exp(-self.decay * t), math.sqrt(-math.expm1(-2 * self.decay * t))

    def rate(self, t: float) -> tuple[float, float]:
        alpha, sigma = self.alpha_sigma(t)
        return -self.decay * alpha, self.decay * alpha * alpha / sigma if sigma > 0 else math.inf

    def time(self, log_snr: float) -> float:
        return 0.5 / self.decay * softplus(-2 * log_snr)

    def timestep(self, t: float) -> float:
        return t

    def from_timestep(self, timestep: float) -> float:
        return timestep

    def field_sigma(self, t: float) -> float:
        return ratio(self, t)

    def from_sigma(self, sigma: float) -> float:
        return ratio_time(self, sigma)

    def train_time(self, u: float) -> float:
        return self.t_start * (1.0 - u)


@dataclass(frozen=True)
class VPSDE:
    """The variance-preserving SDE, ``beta(t)`` rising linearly from ``beta_min`` to ``beta_max`` over [0, 1].

    Networks are told ``999 * t``, as in the paper's code; its samplers stop at ``t = 0.001``.

    Source: Song et al. 2020, arXiv:2011.13456, eq. 32 and 33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 0.0
    t_min: float = 0.001

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        total = _integral(self, t)
        return math.exp(-0.5 * total), math.sqrt(-math.expm1(-total))

    def rate(self, t: float) -> tuple[float, float]:
        alpha, sigma = self.alpha_sigma(t)
        half = 0.5 * _beta(self, t)
        return -half * alpha, half * alpha * alpha / sigma if sigma > 0 else math.inf

    def time(self, log_snr: float) -> float:
        return _inverse_integral(self, softplus(-2 * log_snr))

    def timestep(self, t: float) -> float:
        return 999.0 * t

    def from_timestep(self, timestep: float) -> float:
        return timestep / 999.0

    def field_sigma(self, t: float) -> float:
        return ratio(self, t)

    def from_sigma(self, sigma: float) -> float:
        return ratio_time(self, sigma)

    def train_time(self, u: float) -> float:
        return self.t_start * (1.0 - u)


@dataclass(frozen=True)
class SubVPSDE:
    """The sub-VP SDE: the signal of ``VPSDE``, with the square of its noise level, ``sigma = 1 - alpha^2``.

    Source: Song et al. 2020, arXiv:2011.13456, eq. 29.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 0.0
    t_min: float = 0.001

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        total = _integral(self, t)
        return math.exp(-0.5 * total), -math.expm1(-total)

    def rate(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        total, beta = _integral(self, t), _beta(self, t)
        return -0.5 * beta * math.exp(-0.5 * total), beta * math.exp(-total)

    def time(self, log_snr: float) -> float:
        # sigma / alpha = 1 / alpha - alpha = 2 sinh(integral / 2)
        if log_snr < -300.0:
            return _inverse_integral(self, -2 * log_snr)
        return _inverse_integral(self, 2 * math.asinh(0.5 * noise_ratio(log_snr)))

    def timestep(self, t: float) -> float:
        return 999.0 * t

    def from_timestep(self, timestep: float) -> float:
        return timestep / 999.0

    def field_sigma(self, t: float) -> float:
        return ratio(self, t)

    def from_sigma(self, sigma: float) -> float:
        return ratio_time(self, sigma)

    def train_time(self, u: float) -> float:
        return self.t_start * (1.0 - u)


@dataclass(frozen=True)
class VE:
    """The variance-exploding SDE: ``sigma`` geometric in t, from ``sigma_min`` to ``sigma_max`` over (0, 1].

    At ``t = 0`` sigma is 0 and not ``sigma_min``, as in the paper: the path jumps there, so that the last step of a
    sampler lands on data. Networks are told ``sigma``.

    Source: Song et al. 2020, arXiv:2011.13456, eq. 30 and 31 and the remark after them.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_start: float = 1.0
    t_end: float = 0.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise PlanError(f"sigma runs from {self.sigma_min!r} to {self.sigma_max!r}; allowed: 0 < min < max")

    @property
    def _growth(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        return 1.0, self.sigma_min * math.exp(self._growth * t) if t > 0 else 0.0

    def rate(self, t: float) -> tuple[float, float]:
        return 0.0, self._growth * self.sigma_min * math.exp(self._growth * t)

    def time(self, log_snr: float) -> float:
        return (-log_snr - math.log(self.sigma_min)) / self._growth if log_snr < math.inf else 0.0

    def timestep(self, t: float) -> float:
        return self.alpha_sigma(t)[1]

    def from_timestep(self, timestep: float) -> float:
        return self.from_sigma(timestep)

    def field_sigma(self, t: float) -> float:
        return self.alpha_sigma(t)[1]

    def from_sigma(self, sigma: float) -> float:
        return ratio_time(self, sigma)

    def train_time(self, u: float) -> float:
        return self.t_start * (1.0 - u)


def _check_betas(low: float, high: float) -> None:
    if not 0 < low <= high < math.inf:
        raise PlanError(f"beta runs from {low!r} to {high!r}; allowed: 0 < beta_min <= beta_max")


def _beta(path: VPSDE | SubVPSDE, t: float) -> float:
    return path.beta_min + t * (path.beta_max - path.beta_min)


def _integral(path: VPSDE | SubVPSDE, t: float) -> float:
    return t * (path.beta_min + 0.5 * t * (path.beta_max - path.beta_min))


def _inverse_integral(path: VPSDE | SubVPSDE, total: float) -> float:
    # the root of a quadratic in the form that does not cancel at small times
    return 2 * total / (path.beta_min + math.sqrt(path.beta_min**2 + 2 * (path.beta_max - path.beta_min) * total))
