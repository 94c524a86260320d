"""ER-SDE: a family of stochastic solvers between the ODE and more noise than the time-reversed SDE has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import first_order
from fastdiff.sampling.solvers.base import Row
from fastdiff.sampling.solvers.exponential import GAUSS_PLACES, GAUSS_WEIGHTS

SCALES: dict[str, Callable[[float], float]] = {
    "ode": lambda ratio: 1.0,
    "sde": lambda ratio: ratio,
    "er_sde": lambda ratio: math.exp(ratio**0.3) + 10,
}


@dataclass(frozen=True)
class ERSDE:
    """Extended reverse-time SDE. With ``rho = sigma / alpha`` and a noise scale ``phi(rho) = rho * f(rho)``:

    ``y_s = phi_s / phi_t y_t + int D d(-phi_s / phi) + sqrt(rho_s^2 - (rho_t phi_s / phi_t)^2) z``, ``y = x / alpha``,
    D being the polynomial in ``rho`` through the last estimates. Steps that touch pure noise or clean data are of first
    order.

    Source: Cui et al. 2023, arXiv:2309.06169, sec. 3 and 4, with true divided differences for the second derivative.

    Args:
        estimates: estimates of the polynomial, 1 to 3.
        scale: ``f``: ``"er_sde"`` (the paper's fifth), ``"sde"`` (the time-reversed SDE) or ``"ode"``.
    """

    estimates: int = 3
    scale: str = "er_sde"
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.estimates not in (1, 2, 3):
            raise PlanError(f"estimates is {self.estimates!r}; allowed: 1, 2, 3")
        if self.scale not in SCALES:
            raise PlanError(f"scale is {self.scale!r}; allowed: {', '.join(SCALES)}")

    @property
    def order(self) -> int:
        """With fresh noise 1: old estimates are correlated with noise already drawn."""
        return self.estimates if self.scale == "ode" else 1

    @property
    def history(self) -> int:
        return self.estimates - 1

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows: list[Row] = []
        pushed = {"denoised": 1.0} if self.history else None
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            known = [u for u in reversed(times[max(0, i - self.history) : i]) if path.alpha_sigma(u)[0] > 0]
            weights, fresh = self._step(path, t, s, known)
            draws = (i if fresh else None, None)
            rows.append(Row(t, t, weights | ({"n1": fresh} if fresh else {}), None, pushed, True, draws))
        return tuple(rows)

    def _step(self, path: Path, t: float, s: float, known: Sequence[float]) -> tuple[dict[str, float], float]:
        (alpha_t, _), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        r, _ = first_order(path, t, s)
        f = SCALES[self.scale]
        if alpha_t == 0:
            share = 1.0 if self.scale == "ode" else 0.0  # f grows without bound
        else:
            share = f(sigma_s / alpha_s) / f(_ratio(path, t))
        kept = r * share
        fresh = sigma_s * math.sqrt(max(1 - share * share, 0.0))
        weights = {"x": kept, "denoised": alpha_s - kept * alpha_t}
        if known and alpha_t > 0 and sigma_s > 0:
            for age, weight in enumerate(self._differences(path, t, s, known), start=1):
                weights[f"h{age}"] = alpha_s * weight
                weights["denoised"] -= alpha_s * weight
        return weights, fresh

    def _differences(self, path: Path, t: float, s: float, known: Sequence[float]) -> tuple[float, ...]:
        f, first, last = SCALES[self.scale], _ratio(path, t), _ratio(path, s)
        places = np.array([(first - _ratio(path, u)) / (first - last) for u in known])
        # by parts: int v^k d(-phi_s / phi) = 1 - k int v^(k-1) phi_s / phi dv, the integral taken over log(rho)
        rho = first * np.exp(GAUSS_PLACES * math.log(last / first))
        v = (first - rho) / (first - last)
        kernel = np.array([last * f(last) / f(x) for x in rho]) * math.log(first / last) / (first - last)
        moments = [1 - k * float((GAUSS_WEIGHTS * v ** (k - 1) * kernel).sum()) for k in range(1, len(known) + 1)]
        powers = np.vander(places, len(known) + 1, increasing=True)[:, 1:]
        return tuple(np.linalg.solve(powers.T, np.array(moments)).tolist())


def _ratio(path: Path, t: float) -> float:
    alpha, sigma = path.alpha_sigma(t)
    return sigma / alpha
