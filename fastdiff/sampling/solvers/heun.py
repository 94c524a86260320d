"""Heun's second-order method, two rows per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import first_order
from fastdiff.sampling.solvers.base import Row


@dataclass(frozen=True)
class Heun:
    """Heun in the coordinates ``y = x / (alpha + sigma)``, ``tau = sigma / (alpha + sigma)``.

    There every path is the straight one, ``dy/dtau = (y - D) / tau``, without a singularity at either end; on the
    straight path this is Heun in ``t`` itself. The step to clean data is Euler's, as published.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1, in other coordinates.
    """

    order: int = 2
    history: int = 1
    jumps: bool = False

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows = []
        for t, s in pairwise(times):
            r, m = first_order(path, t, s)
            sigma_s = path.alpha_sigma(s)[1]
            if sigma_s == 0:
                rows.append(Row(t, t, {"x": r, "denoised": m}))
                continue
            rows.append(Row(t, t, {"x": r, "denoised": m}, {"anchor": 1.0}, {"denoised": 1.0}, ends=False))
            rows.append(Row(s, s, self._average(path, t, s)))
        return tuple(rows)

    def _average(self, path: Path, t: float, s: float) -> dict[str, float]:
        """Both slopes, at weight 1/2: ``(anchor / scale_t - h1) / tau_t`` and ``(x / scale_s - D) / tau_s``."""
        scale_t, scale_s = sum(path.alpha_sigma(t)), sum(path.alpha_sigma(s))
        tau_t, tau_s = path.alpha_sigma(t)[1] / scale_t, path.alpha_sigma(s)[1] / scale_s
        half_t, half_s = (tau_s - tau_t) / (2 * tau_t), (tau_s - tau_t) / (2 * tau_s)
        return {
            "anchor": scale_s / scale_t * (1 + half_t),
            "h1": -scale_s * half_t,
            "x": half_s,
            "denoised": -scale_s * half_s,
        }
