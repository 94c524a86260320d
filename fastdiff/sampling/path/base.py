"""What a forward process is, and the little arithmetic that all of them share."""

from __future__ import annotations

import math
from typing import Protocol

from fastdiff.errors import PlanError


class Path(Protocol):
    """A forward process in closed form."""

    @property
    def t_start(self) -> float: ...
    @property
    def t_end(self) -> float: ...

    @property
    def t_min(self) -> float:
        """The least time at which networks on this path are usually asked.

        Grids over noise levels end there; one more step goes on to ``t_end``. At or below ``t_end`` on a path whose
        end still holds noise.
        """

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Return ``(alpha, sigma)`` at ``t``, dimensionless."""

    def rate(self, t: float) -> tuple[float, float]:
        """Return ``(d alpha / dt, d sigma / dt)`` at ``t``; infinite where sigma grows like a root from 0."""

    def time(self, log_snr: float) -> float:
        """Return the ``t`` at which ``log(alpha / sigma)`` has this value (the inverse of ``log_snr``)."""

    def timestep(self, t: float) -> float:
        """Return what networks trained on this path are told instead of ``t`` (diffusers' ``timestep``)."""

    def from_timestep(self, timestep: float) -> float:
        """The inverse of ``timestep``."""

    def field_sigma(self, t: float) -> float:
        """Return the field's ``sigma`` (diffusers' ``sigmas``) at ``t``; infinite at pure noise on most paths."""

    def from_sigma(self, sigma: float) -> float:
        """The inverse of ``field_sigma``."""

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


def ratio(path: Path, t: float) -> float:
    """Return ``sigma / alpha``, infinite at pure noise."""
    alpha, sigma = path.alpha_sigma(t)
    return sigma / alpha if alpha > 0 else math.inf


def ratio_time(path: Path, value: float) -> float:
    """Return the time at which ``sigma / alpha`` has this value."""
    return path.time(-math.log(value)) if value > 0 else path.t_end


def check_time(path: Path, t: float) -> None:
    """Raise ``PlanError`` unless ``t`` lies on the path."""
    if not path.t_end <= t <= path.t_start:
        raise PlanError(f"time {t!r} is outside this path: allowed are {path.t_end} to {path.t_start}")


def softplus(x: float) -> float:
    """``log(1 + exp(x))`` without overflow, to the last digits on both sides."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def noise_ratio(log_snr: float) -> float:
    """``exp(-log_snr)``, infinite where float64 ends."""
    return math.exp(-log_snr) if log_snr > -709.0 else math.inf
