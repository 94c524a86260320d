"""Lists of betas made continuous, and the schedules of the field that make them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fastdiff.errors import PlanError
from fastdiff.sampling.path.base import check_time, ratio, ratio_time, softplus


@dataclass(frozen=True)
class DiscreteVP:
    """The variance-preserving path of a list of betas, made continuous.

    ``t = k`` is the state after ``k`` noising steps, so ``t = 0`` is clean data and diffusers' timestep is ``t - 1``.
    Between the integers ``log(alpha^2)`` is linear, that is the VP-SDE with a piecewise constant rate; at the integers
    the values are exactly the published products. The last beta may be 1 (zero terminal signal): ``alpha`` itself is
    linear there, from its last value to exactly 0.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4; Song et al. 2020, arXiv:2011.13456, eq. 11.
    """

    betas: tuple[float, ...]
    t_end: float = 0.0
    _log_alpha_bar: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bad = next((b for b in self.betas[:-1] if not 0 < b < 1), None)
        if bad is None and self.betas and not 0 < self.betas[-1] <= 1:
            bad = self.betas[-1]
        if bad is not None or not self.betas:
            raise PlanError(
                f"betas hold {bad!r}: allowed is a non-empty list of numbers inside (0, 1), of which the last may be 1"
            )
        total, logs = 0.0, [0.0]
        for beta in self.betas:
            total += math.log1p(-beta) if beta < 1 else -math.inf
            logs.append(total)
        object.__setattr__(self, "_log_alpha_bar", tuple(logs))

    @property
    def t_start(self) -> float:
        return float(len(self.betas))

    @property
    def t_min(self) -> float:
        return 1.0

    def _interval(self, t: float) -> tuple[int, float, float]:
        """The whole time below ``t``, and ``log(alpha^2)`` at both ends of that interval."""
        check_time(self, t)
        k = min(max(math.ceil(t) - 1, 0), len(self.betas) - 1)
        return k, self._log_alpha_bar[k], self._log_alpha_bar[k + 1]

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        k, low, high = self._interval(t)
        if high == -math.inf:
            alpha = (k + 1 - t) * math.exp(0.5 * low)
            return alpha, math.sqrt((1 - alpha) * (1 + alpha))
        log_bar = low + (high - low) * (t - k)
        return math.exp(0.5 * log_bar), math.sqrt(-math.expm1(log_bar))

    def rate(self, t: float) -> tuple[float, float]:
        _, low, high = self._interval(t)
        alpha, sigma = self.alpha_sigma(t)
        slope = -math.exp(0.5 * low) if high == -math.inf else 0.5 * (high - low) * alpha
        return slope, -slope * alpha / sigma if sigma > 0 else math.inf

    def time(self, log_snr: float) -> float:
        log_bar = -softplus(-2 * log_snr)
        k = bisect_left(self._log_alpha_bar, -log_bar, key=lambda v: -v)
        k = min(max(k, 1), len(self.betas))
        low, high = self._log_alpha_bar[k - 1], self._log_alpha_bar[k]
        if high == -math.inf:
            return k - math.exp(0.5 * (log_bar - low))
        return k - 1 + (log_bar - low) / (high - low)

    def timestep(self, t: float) -> float:
        return t - 1.0

    def from_timestep(self, timestep: float) -> float:
        return timestep + 1.0

    def field_sigma(self, t: float) -> float:
        return ratio(self, t)

    def from_sigma(self, sigma: float) -> float:
        return ratio_time(self, sigma)

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
    """Betas of the squared cosine (``squaredcos_cap_v2``). Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.

    Args:
        n: how many.
        max_beta: cap of a beta.
    """
    return _from_alpha_bar(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, n, max_beta)


def exp_betas(n: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
    """Betas of ``alpha^2 = exp(-12 u)``, all equal.

    Source: diffusers' ``betas_for_alpha_bar`` with ``alpha_transform_type="exp"``.
    """
    return _from_alpha_bar(lambda u: math.exp(-12.0 * u), n, max_beta)


def laplace_betas(n: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
    """Betas whose log-SNR follows a Laplace distribution, most of them near the middle.

    Source: diffusers' ``betas_for_alpha_bar`` with ``alpha_transform_type="laplace"``, after Hang et al. 2024,
    arXiv:2407.03297, table 1. Its ``alpha^2`` is the root of ``snr / (1 + snr)``, not that ratio itself.
    """

    def bar(u: float) -> float:
        exponent = -0.5 * math.copysign(1.0, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
        return math.sqrt(1 / (1 + math.exp(-exponent)))

    return _from_alpha_bar(bar, n, max_beta)


def zero_terminal_snr(path: DiscreteVP) -> DiscreteVP:
    """Move the end of a list of betas to pure noise: ``alpha(t_start)`` becomes exactly 0, the first beta stays.

    A network that predicts eps says nothing at that end; it takes ``v`` or ``x0``.

    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    if len(path.betas) < 2:
        raise PlanError(f"{len(path.betas)} betas: at least 2 are needed, one to keep and one to move")
    roots = [path.alpha_sigma(float(k))[0] for k in range(1, len(path.betas) + 1)]
    first, last = roots[0], roots[-1]
    moved = [(root - last) * first / (first - last) for root in roots]
    betas = [1 - (after / before) ** 2 for before, after in zip(moved, moved[1:], strict=False)]
    return replace(path, betas=(path.betas[0], *betas))


def _from_alpha_bar(bar: Callable[[float], float], n: int, max_beta: float) -> DiscreteVP:
    return DiscreteVP(tuple(min(1 - bar((i + 1) / n) / bar(i / n), max_beta) for i in range(n)))


def _linspace(first: float, last: float, n: int) -> Sequence[float]:
    if n < 2:
        raise PlanError(f"{n!r} betas: at least 2 are needed")
    return [first + (last - first) * i / (n - 1) for i in range(n)]
