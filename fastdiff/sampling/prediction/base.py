"""What a prediction is, and the arithmetic of a first-order step."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path


class Coefficients(NamedTuple):
    """``D = c_skip * x + c_out * F(c_in * x, c_noise, c_noise_to)``, all float64.

    ``c_noise_to`` repeats ``c_noise`` for a network that takes one time.
    """

    c_in: float
    c_skip: float
    c_out: float
    c_noise: float
    c_noise_to: float


class Target(NamedTuple):
    """What the network regresses at one time: ``data * x0 + noise * z``, its squared error times ``weight``."""

    data: float
    noise: float
    weight: float = 1.0


class Prediction(Protocol):
    """One kind of network output."""

    @property
    def two_time(self) -> bool:
        """Does the network take the target time too?"""

    @property
    def jumps(self) -> bool:
        """Is ``D`` the end of one jump, and not the mean of the clean images behind ``x``?

        Such a ``D`` belongs to one interval: from ``t`` to any ``s`` for two-time networks, from ``t`` to ``t_end``
        for one-time ones (consistency networks). Estimates of different intervals must not be mixed, so only solvers
        with ``jumps`` may take them; ``coefficients`` refuses the intervals that the network does not know.
        """

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        """Return the coefficients at ``t``; ``s`` is where the step is to land."""

    def target(self, path: Path, t: float) -> Target:
        """Return the regression target at ``t``."""


def first_order(path: Path, t: float, s: float) -> tuple[float, float]:
    """Return ``(r, m)`` of the first-order step ``x_s = r * x_t + m * D``.

    No logarithm and no infinity: valid at ``sigma(s) = 0`` and at ``alpha(t) = 0``.

    Source: Song et al. 2020, arXiv:2010.02502, eq. 12 with eta = 0, restated for any alpha and sigma.
    """
    alpha_t, sigma_t = path.alpha_sigma(t)
    alpha_s, sigma_s = path.alpha_sigma(s)
    if sigma_t == 0:
        raise PlanError(f"a step cannot start at t={t!r}: there is no noise left to remove")
    r = sigma_s / sigma_t
    return r, alpha_s - r * alpha_t


def need_signal(kind: str, path: Path, t: float) -> tuple[float, float]:
    """Return ``(alpha, sigma)``, or raise ``PlanError`` where alpha is 0."""
    alpha, sigma = path.alpha_sigma(t)
    if alpha == 0:
        raise PlanError(
            f"a network that predicts {kind} says nothing at t={t!r}, where alpha is 0: start later, or use 'v', "
            "'velocity' or 'x0'"
        )
    return alpha, sigma


def need_noise(kind: str, path: Path, t: float) -> tuple[float, float]:
    """Return ``(alpha, sigma)``, or raise ``PlanError`` where sigma is 0."""
    alpha, sigma = path.alpha_sigma(t)
    if sigma == 0:
        raise PlanError(f"{kind} does not exist at t={t!r}, where sigma is 0: train and sample above it")
    return alpha, sigma


def landing(path: Path, t: float, s: float, skip: float, out: float) -> tuple[float, float]:
    """Return ``(c_skip, c_out)`` of the D whose first-order step from t to s lands on ``skip * x + out * F``."""
    r, m = first_order(path, t, s)
    return (skip - r) / m, out / m


def one_time(path: Path, t: float) -> tuple[float, float]:
    """Return ``(c_noise, c_noise_to)`` of a network that is told ``t`` alone."""
    return path.timestep(t), path.timestep(t)


def both_times(path: Path, t: float, s: float) -> tuple[float, float]:
    """Return what a two-time network is told of ``t`` and ``s``.

    Raises:
        PlanError: where the path tells networks the logarithm of a level that is 0.
    """
    told = path.timestep(t), path.timestep(s)
    if not all(math.isfinite(value) for value in told):
        raise PlanError(
            f"a {type(path).__name__} path tells its network {told} of the step from t={t!r} to s={s!r}; allowed: "
            "finite numbers, so end the path above 0 (t_end)"
        )
    return told
