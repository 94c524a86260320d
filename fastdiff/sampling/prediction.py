"""What a network was trained to predict, as five host numbers that turn its output into a denoised estimate.

``D = c_skip * x + c_out * F(c_in * x, c_noise, c_noise_to)``. For a one-time network ``D`` estimates the clean image.
For a two-time network (a flow map) ``D`` is *defined* as the value that makes the first-order step from ``t`` to ``s``
land exactly on the network's own jump, so that a flow map needs no solver of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path


class Coefficients(NamedTuple):
    """``D = c_skip * x + c_out * F(c_in * x, c_noise, c_noise_to)``, all float64."""

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


def _need_signal(kind: str, path: Path, t: float) -> tuple[float, float]:
    alpha, sigma = path.alpha_sigma(t)
    if alpha == 0:
        raise PlanError(
            f"a network that predicts {kind} says nothing at t={t!r}, where alpha is 0: start later, or use 'v', "
            "'velocity' or 'x0'"
        )
    return alpha, sigma


@dataclass(frozen=True)
class Eps:
    """The noise z. Source: Ho et al. 2020, arXiv:2006.11239, eq. 14."""

    two_time: bool = False

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = _need_signal("eps", path, t)
        return Coefficients(1.0, 1 / alpha, -sigma / alpha, path.timestep(t), path.timestep(s))

    def target(self, path: Path, t: float) -> Target:
        return Target(0.0, 1.0)


@dataclass(frozen=True)
class X0:
    """The clean image. Source: Salimans and Ho 2022, arXiv:2202.00512, sec. 4."""

    two_time: bool = False

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        return Coefficients(1.0, 0.0, 1.0, path.timestep(t), path.timestep(s))

    def target(self, path: Path, t: float) -> Target:
        return Target(1.0, 0.0)


@dataclass(frozen=True)
class V:
    """``v = alpha * z - sigma * x0``. Source: Salimans and Ho 2022, arXiv:2202.00512, app. D, for any path."""

    two_time: bool = False

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = path.alpha_sigma(t)
        norm = alpha * alpha + sigma * sigma
        return Coefficients(1.0, alpha / norm, -sigma / norm, path.timestep(t), path.timestep(s))

    def target(self, path: Path, t: float) -> Target:
        alpha, sigma = path.alpha_sigma(t)
        return Target(-sigma, alpha)


@dataclass(frozen=True)
class Score:
    """The score ``grad log p_t(x)``, the conditional mean of ``-z / sigma``.

    Source: Song et al. 2020, arXiv:2011.13456, eq. 7.

    The loss is weighted by sigma^2, the weighting of that paper, without which small sigma would drown the rest.
    """

    two_time: bool = False

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = _need_signal("score", path, t)
        return Coefficients(1.0, 1 / alpha, sigma * sigma / alpha, path.timestep(t), path.timestep(s))

    def target(self, path: Path, t: float) -> Target:
        _, sigma = path.alpha_sigma(t)
        if sigma == 0:
            raise PlanError(f"the score does not exist at t={t!r}, where sigma is 0: train and sample above it")
        return Target(0.0, -1 / sigma, sigma * sigma)


@dataclass(frozen=True)
class Velocity:
    """``dx/dt = alpha' * x0 + sigma' * z``. Source: Lipman et al. 2022, arXiv:2210.02747, eq. 13 and 14."""

    two_time: bool = False

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = path.alpha_sigma(t)
        alpha_rate, sigma_rate = path.rate(t)
        k = alpha_rate * sigma - sigma_rate * alpha
        return Coefficients(1.0, -sigma_rate / k, sigma / k, path.timestep(t), path.timestep(s))

    def target(self, path: Path, t: float) -> Target:
        return Target(*path.rate(t))


@dataclass(frozen=True)
class EDMPreconditioned:
    """EDM's preconditioned output, on any path through ``x / alpha``.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1.
    """

    sigma_data: float = 0.5
    two_time: bool = False

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        alpha, sigma = _need_signal("EDM's output", path, t)
        ratio, data = sigma / alpha, self.sigma_data
        total = ratio * ratio + data * data
        return Coefficients(
            1 / (alpha * total**0.5),
            data * data / (total * alpha),
            ratio * data / total**0.5,
            path.timestep(t),
            path.timestep(s),
        )

    def target(self, path: Path, t: float) -> Target:
        alpha, sigma = path.alpha_sigma(t)
        _, skip, out, _, _ = self.coefficients(path, t, t)
        return Target((1 - skip * alpha) / out, -skip * sigma / out)


@dataclass(frozen=True)
class MeanVelocity:
    """The mean of ``dx/dt`` over [s, t] along the ODE: a flow map. At s = t it is the velocity.

    Source: Geng et al. 2025, MeanFlow, arXiv:2505.13447, eq. 3; Boffi et al. 2024, arXiv:2406.07507, eq. 9.
    """

    two_time: bool = True

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        if s == t:
            return Velocity().coefficients(path, t, s)
        r, m = first_order(path, t, s)
        return Coefficients(1.0, (1 - r) / m, (s - t) / m, path.timestep(t), path.timestep(s))

    def target(self, path: Path, t: float) -> Target:
        return Velocity().target(path, t)


@dataclass(frozen=True)
class DirectMap:
    """The landing point ``x_s`` itself: a flow map. Source: Kim et al. 2023, CTM, arXiv:2310.02279, eq. 4."""

    two_time: bool = True

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        if s == t:
            raise PlanError(f"a direct map has no denoised estimate at s = t = {t!r}: give it a target below t")
        r, m = first_order(path, t, s)
        return Coefficients(1.0, -r / m, 1 / m, path.timestep(t), path.timestep(s))

    def target(self, path: Path, t: float) -> Target:
        raise PlanError("a direct map is not learned by regression at one time: train 'velocity' and distil")


PREDICTIONS: dict[str, Prediction] = {
    "eps": Eps(),
    "x0": X0(),
    "v": V(),
    "score": Score(),
    "velocity": Velocity(),
    "edm": EDMPreconditioned(),
    "mean_velocity": MeanVelocity(),
    "direct_map": DirectMap(),
}
