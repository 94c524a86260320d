"""UniPC: a multistep predictor and a corrector that needs no network evaluation of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path, log_snr
from fastdiff.sampling.prediction import first_order
from fastdiff.sampling.solvers.base import Row, log_snr_step


@dataclass(frozen=True)
class UniPC:
    """UniPC with B(h) = exp(h) - 1 (``bh2``), data prediction.

    The evaluation at a predicted state first corrects that state (the new anchor), then predicts the next one from it.

    Source: Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 7, eq. 9.

    Args:
        order: number of estimates the predictor uses, 1 to 3.
        corrector: apply UniC.
    """

    order: int = 2
    corrector: bool = True
    jumps: bool = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise PlanError(f"order is {self.order!r}; allowed: 1, 2, 3")

    @property
    def history(self) -> int:
        return self.order

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows, past = [], [times[0]]  # times of D (newest first), of h1, h2...
        steps = len(times) - 1
        # the step to clean data is of first order; the orders fall towards it, as in the published code
        falls = path.alpha_sigma(times[-1])[1] == 0
        orders = [min(i + 1, self.order, steps - i if falls else self.order) for i in range(steps)]
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            corrected = {"x": 1.0}
            if i and self.corrector and math.isfinite(log_snr_step(path, past[1], t)):
                known = self._usable(path, past[1:], orders[i - 1])
                corrected = _update(path, past[1], t, known, ["h1", "h2", "h3"], "anchor", corrects=True)
            known = self._usable(path, past, orders[i]) if math.isfinite(log_snr_step(path, t, s)) else [t]
            predicted = _update(path, t, s, known, ["denoised", "h1", "h2"], "state", corrects=False)
            scale = predicted.pop("state")
            to_x = {n: scale * corrected.get(n, 0.0) + predicted.get(n, 0.0) for n in {*corrected, *predicted}}
            rows.append(Row(t, t, to_x, corrected, {"denoised": 1.0}))
            past.insert(0, s)
        return tuple(rows)

    @staticmethod
    def _usable(path: Path, past: Sequence[float], order: int) -> list[float]:
        """The newest estimates, up to ``order``, stopping at pure noise, whose log-SNR is infinite."""
        usable = list(past[:1])
        for time in past[1:order]:
            if not math.isfinite(log_snr(path, time)):
                break
            usable.append(time)
        return usable


def _update(
    path: Path,
    t: float,
    s: float,
    known: Sequence[float],
    names: Sequence[str],
    state: str,
    *,
    corrects: bool,
) -> dict[str, float]:
    """Weights of one UniP or UniC update from ``t`` to ``s``; ``names`` are the registers of what is ``known``."""
    r, m = first_order(path, t, s)
    weights = {state: r, names[0]: m}
    ratios = [log_snr_step(path, t, other) / log_snr_step(path, t, s) for other in known[1:]]
    others = list(names[1 : len(known)])
    if corrects:
        ratios.append(1.0)
        others.append("denoised")
    if not ratios:
        return weights
    coefficients = _solve(np.array(ratios), -log_snr_step(path, t, s))
    # alpha_s * B(h) = alpha_s * (exp(-h) - 1) = -m, and h here is -h there
    for name, ratio, rho in zip(others, ratios, coefficients, strict=True):
        weights[name] = weights.get(name, 0.0) + m * rho / ratio
        weights[names[0]] -= m * rho / ratio
    return weights


def _solve(ratios: np.ndarray, h: float) -> np.ndarray:
    """Solve eq. 9 for the weights of the differences; a single one weighs 1/2, whose error is of the same order."""
    size = len(ratios)
    if size == 1:
        return np.array([0.5])
    b, phi, factorial = [], math.expm1(h) / h - 1, 1
    for k in range(1, size + 1):
        b.append(phi * factorial / math.expm1(h))
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    return np.linalg.solve(np.vander(ratios, size, increasing=True).T, np.array(b))
