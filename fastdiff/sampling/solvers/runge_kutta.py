"""Explicit Runge-Kutta methods by tableau; Heun's among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers.base import Row, ddim_weights


class Tableau(NamedTuple):
    """Butcher's tableau of an explicit method: stage ``j`` stands at ``c[j]`` and uses the slopes before it."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


# Source: Hairer, Norsett, Wanner, "Solving ODEs I", tables II.1.1 and II.1.2; Ralston 1962
TABLEAUS = {
    "heun": Tableau(2, (0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "midpoint": Tableau(2, (0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "ralston": Tableau(3, (0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "classic": Tableau(4, (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@dataclass(frozen=True)
class RungeKutta:
    """Runge-Kutta on ``dy/dtau``, one row for each stage.

    The coordinates are ``y = x / scale`` and ``tau = sigma / scale``. With ``scale = alpha + sigma`` every path is the
    straight one, ``dy/dtau = (y - D) / tau``, without a singularity at pure noise; on the straight path this is the
    method in ``t`` itself. With ``scale = alpha`` (``coordinate="ratio"``) the slope is the noise estimate and the
    method is that of EDM and k-diffusion. A step to clean data that has a stage there is Euler's, as published.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1 (Heun), in either coordinate.

    Args:
        tableau: a name of ``TABLEAUS``.
        coordinate: ``"share"`` (sigma / (alpha + sigma)) or ``"ratio"`` (sigma / alpha).
    """

    tableau: str = "heun"
    coordinate: str = "share"
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.tableau not in TABLEAUS:
            raise PlanError(f"tableau is {self.tableau!r}; allowed: {', '.join(TABLEAUS)}")
        if self.coordinate not in ("share", "ratio"):
            raise PlanError(f"coordinate is {self.coordinate!r}; allowed: 'share', 'ratio'")

    @property
    def order(self) -> int:
        return TABLEAUS[self.tableau].order

    @property
    def history(self) -> int:
        return len(TABLEAUS[self.tableau].c) - 1

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows: list[Row] = []
        for t, s in zip(times, times[1:], strict=False):
            rows += self._step(path, t, s) if self._regular(path, t, s) else [Row(t, t, ddim_weights(path, t, s))]
        return tuple(rows)

    def _regular(self, path: Path, t: float, s: float) -> bool:
        lands_on_data = path.alpha_sigma(s)[1] == 0 and 1 in TABLEAUS[self.tableau].c
        return not lands_on_data and self._scale(path, t) > 0

    def _scale(self, path: Path, t: float) -> float:
        alpha, sigma = path.alpha_sigma(t)
        return alpha + sigma if self.coordinate == "share" else alpha

    def _slope(self, path: Path, t: float) -> dict[str, float]:
        """``dy/dtau`` at what the network has just seen."""
        alpha, sigma = path.alpha_sigma(t)
        return {"x": 1 / sigma, "denoised": -(alpha + sigma) / sigma if self.coordinate == "share" else -alpha / sigma}

    def _step(self, path: Path, t: float, s: float) -> list[Row]:
        tableau = TABLEAUS[self.tableau]
        start, end = (path.alpha_sigma(v)[1] / self._scale(path, v) for v in (t, s))
        stages = [t if c == 0 else s if c == 1 else self._time(path, start + c * (end - start)) for c in tableau.c]
        rows = []
        for j, now in enumerate(stages):
            last = j == len(stages) - 1
            goal = s if last else stages[j + 1]
            shares = tableau.b if last else tableau.a[j + 1]
            to_x = self._move(path, t, goal, now, "x" if j == 0 else "anchor", shares, end - start)
            keep = None if last else {"x": 1.0} if j == 0 else {"anchor": 1.0}
            rows.append(Row(now, now, to_x, keep, None if last else self._slope(path, now), last))
        return rows

    def _move(
        self, path: Path, t: float, goal: float, now: float, state: str, shares: Sequence[float], span: float
    ) -> dict[str, float]:
        """From the state at ``t`` to ``goal`` along a mix of slopes, of which the last is the current one."""
        scale = self._scale(path, goal)
        weights = {state: scale / self._scale(path, t)}
        for age, share in enumerate(reversed(shares[:-1]), start=1):
            if share:
                weights[f"h{age}"] = scale * span * share
        for name, value in self._slope(path, now).items():
            weights[name] = weights.get(name, 0.0) + scale * span * shares[-1] * value
        return weights

    def _time(self, path: Path, tau: float) -> float:
        ratio = tau / (1 - tau) if self.coordinate == "share" else tau
        return path.time(-math.log(ratio))


def heun(coordinate: str = "share") -> RungeKutta:
    """Heun's method, order 2. Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1."""
    return RungeKutta("heun", coordinate)


def rk2(coordinate: str = "share") -> RungeKutta:
    """The explicit midpoint rule, order 2."""
    return RungeKutta("midpoint", coordinate)


def rk3(coordinate: str = "share") -> RungeKutta:
    """Ralston's third-order method."""
    return RungeKutta("ralston", coordinate)


def rk4(coordinate: str = "share") -> RungeKutta:
    """The classic fourth-order method."""
    return RungeKutta("classic", coordinate)
