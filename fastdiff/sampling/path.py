"""Forward processes: how data turns into noise, ``x_t = alpha(t) * x0 + sigma(t) * z``.

Everything here is host arithmetic in float64. ``t`` falls from ``t_start`` (noise) to ``t_end`` (data) when sampling.
A path is defined by the square-root signal and noise levels; the SDE and the ODE that share these marginals follow
from ``alpha, sigma`` and their time derivatives alone (Song et al. 2020, arXiv:2011.13456, sec. 3 and 4).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastdiff.errors import PlanError


class Path(Protocol):
    """A forward process in closed form."""

    @property
    def t_start(self) -> float: ...
    @property
    def t_end(self) -> float: ...

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Return ``(alpha, sigma)`` at ``t``, dimensionless."""

    def rate(self, t: float) -> tuple[float, float]:
        """Return ``(d alpha / dt, d sigma / dt)`` at ``t``."""

    def time(self, log_snr: float) -> float:
        """Return the ``t`` at which ``log(alpha / sigma)`` has this value (the inverse of ``log_snr``)."""

    def timestep(self, t: float) -> float:
        """Return what networks trained on this path are told instead of ``t`` (diffusers' ``timestep``)."""

    def from_timestep(self, timestep: float) -> float:
        """The inverse of ``timestep``."""

    def from_sigma(self, sigma: float) -> float:
        """Return the time at which the field's ``sigma`` of this path has this value (diffusers' ``sigmas``)."""

    def train_time(self, u: float) -> float:
        """Map a uniform draw ``u`` in [0, 1) to a training time."""


def log_snr(path: Path, t: float) -> float:
    """Return ``lambda = log(alpha / sigma)``, the half log signal-to-noise ratio; infinite at the two ends.

    Source: Lu et al. 2022, arXiv:2206.00927, sec. 3.1.
    """
    alpha, sigma = path.alpha_sigma(t)
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


def _ratio_time(path: Path, ratio: float) -> float:
    return path.time(-math.log(ratio)) if ratio > 0 else path.t_end


def _check_time(path: Path, t: float) -> None:
    if not min(path.t_end, path.t_start) <= t <= max(path.t_end, path.t_start):
        raise PlanError(f"time {t!r} is outside this path: allowed are {path.t_end} to {path.t_start}")


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path ``x_t = (1 - t) * x0 + t * z``, t from 1 to 0.

    Source: Liu et al. 2022, arXiv:2209.03003, eq. 1; Lipman et al. 2022, arXiv:2210.02747, with t reversed.
    """

    t_start: float = 1.0
    t_end: float = 0.0

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        _check_time(self, t)
        return 1.0 - t, float(t)

    def rate(self, t: float) -> tuple[float, float]:
        return -1.0, 1.0

    def time(self, log_snr: float) -> float:
        return 1.0 / (1.0 + math.exp(log_snr))

    def timestep(self, t: float) -> float:
        return 1000.0 * t

    def from_timestep(self, timestep: float) -> float:
        return timestep / 1000.0

    def from_sigma(self, sigma: float) -> float:
        return sigma

    def train_time(self, u: float) -> float:
        return 1.0 - u  # in (0, 1]: the pure-noise end is a time people sample from, the clean end is not


@dataclass(frozen=True)
class EDM:
    """The variance-exploding path of EDM: ``x_t = x0 + t * z``.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1 (sigma(t) = t, s(t) = 1).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_end: float = 0.0

    @property
    def t_start(self) -> float:
        return self.sigma_max

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        _check_time(self, t)
        return 1.0, float(t)

    def rate(self, t: float) -> tuple[float, float]:
        return 0.0, 1.0

    def time(self, log_snr: float) -> float:
        return math.exp(-log_snr)

    def timestep(self, t: float) -> float:
        return 0.25 * math.log(t)

    def from_timestep(self, timestep: float) -> float:
        return math.exp(4.0 * timestep)

    def from_sigma(self, sigma: float) -> float:
        return sigma

    def train_time(self, u: float) -> float:
        return math.exp(math.log(self.sigma_min) * (1 - u) + math.log(self.sigma_max) * u)


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """The Ornstein-Uhlenbeck process ``dx = -rate * x dt + sqrt(2 * rate) dw``, run for a time ``t_start``.

    Source: Song et al. 2020, arXiv:2011.13456, eq. 11 with a constant beta = 2 * rate.
    """

    decay: float = 1.0
    t_start: float = 5.0
    t_end: float = 0.0

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        _check_time(self, t)
        return math.exp(-self.decay * t), math.sqrt(-math.expm1(-2 * self.decay * t))

    def rate(self, t: float) -> tuple[float, float]:
        alpha, sigma = self.alpha_sigma(t)
        return -self.decay * alpha, self.decay * alpha * alpha / sigma

    def time(self, log_snr: float) -> float:
        return 0.5 / self.decay * math.log1p(math.exp(-2 * log_snr))

    def timestep(self, t: float) -> float:
        return t

    def from_timestep(self, timestep: float) -> float:
        return timestep

    def from_sigma(self, sigma: float) -> float:
        return _ratio_time(self, sigma)

    def train_time(self, u: float) -> float:
        return self.t_start * (1.0 - u)


@dataclass(frozen=True)
class DiscreteVP:
    """The variance-preserving path of a list of betas, made continuous.

    ``t = k`` is the state after ``k`` noising steps, so ``t = 0`` is clean data and diffusers' timestep is ``t - 1``.
    Between the integers ``log(alpha^2)`` is linear, that is the VP-SDE with a piecewise constant rate; at the integers
    the values are exactly the published products.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4; Song et al. 2020, arXiv:2011.13456, eq. 11.
    """

    betas: tuple[float, ...]
    t_end: float = 0.0
    _log_alpha_bar: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bad = next((b for b in self.betas if not 0 < b < 1), None)
        if bad is not None or not self.betas:
            raise PlanError(f"betas hold {bad!r}: allowed is a non-empty list of numbers inside (0, 1)")
        total, logs = 0.0, [0.0]
        for beta in self.betas:
            total += math.log1p(-beta)
            logs.append(total)
        object.__setattr__(self, "_log_alpha_bar", tuple(logs))

    @property
    def t_start(self) -> float:
        return float(len(self.betas))

    def _log_alpha_bar_at(self, t: float) -> tuple[float, float]:
        _check_time(self, t)
        k = min(max(math.ceil(t) - 1, 0), len(self.betas) - 1)
        slope = self._log_alpha_bar[k + 1] - self._log_alpha_bar[k]
        return self._log_alpha_bar[k] + slope * (t - k), slope

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        log_bar, _ = self._log_alpha_bar_at(t)
        return math.exp(0.5 * log_bar), math.sqrt(-math.expm1(log_bar))

    def rate(self, t: float) -> tuple[float, float]:
        log_bar, slope = self._log_alpha_bar_at(t)
        alpha, sigma = math.exp(0.5 * log_bar), math.sqrt(-math.expm1(log_bar))
        return 0.5 * slope * alpha, -0.5 * slope * alpha * alpha / sigma

    def time(self, log_snr: float) -> float:
        log_bar = -math.log1p(math.exp(-2 * log_snr)) if log_snr > -350 else 2 * log_snr
        k = bisect_left(self._log_alpha_bar, -log_bar, key=lambda v: -v)
        k = min(max(k, 1), len(self.betas))
        low, high = self._log_alpha_bar[k - 1], self._log_alpha_bar[k]
        return k - 1 + (log_bar - low) / (high - low)

    def timestep(self, t: float) -> float:
        return t - 1.0

    def from_timestep(self, timestep: float) -> float:
        return timestep + 1.0

    def from_sigma(self, sigma: float) -> float:
        return _ratio_time(self, sigma)

    def train_time(self, u: float) -> float:
        return 1.0 + math.floor(u * len(self.betas))


def linear_betas(n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteVP:
    """Betas in equal steps. Source: Ho et al. 2020, arXiv:2006.11239, sec. 4."""
    return DiscreteVP(tuple(_linspace(beta_start, beta_end, n)))


def quadratic_betas(n: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteVP:
    """Betas whose roots are in equal steps (``scaled_linear``). Source: Rombach et al. 2021, arXiv:2112.10752."""
    roots = _linspace(math.sqrt(beta_start), math.sqrt(beta_end), n)
    return DiscreteVP(tuple(root * root for root in roots))


def sigmoid_betas(n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteVP:
    """Betas along a sigmoid over [-6, 6]. Source: Xu et al. 2022, GeoDiff, arXiv:2203.02923, app. E."""
    return DiscreteVP(tuple(beta_start + (beta_end - beta_start) / (1 + math.exp(-v)) for v in _linspace(-6.0, 6.0, n)))


def cosine_betas(n: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
    """Betas of the squared-cosine schedule. Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17."""

    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return DiscreteVP(tuple(min(1 - bar((i + 1) / n) / bar(i / n), max_beta) for i in range(n)))


def _linspace(first: float, last: float, n: int) -> Sequence[float]:
    if n < 2:
        raise PlanError(f"{n!r} betas: at least 2 are needed")
    return [first + (last - first) * i / (n - 1) for i in range(n)]


PATHS: dict[str, Callable[[], Path]] = {
    "straight": RectifiedFlow,
    "linear": linear_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
    "cosine": cosine_betas,
    "ornstein_uhlenbeck": OrnsteinUhlenbeck,
    "edm": EDM,
}
