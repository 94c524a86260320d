"""DPM-Solver++: multistep of second order, and the two-stage stochastic single-step form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path, log_snr
from fastdiff.sampling.prediction import first_order
from fastdiff.sampling.solvers.base import Row, Weights, ddim_weights, log_snr_step


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M). The first step, and steps that touch pure noise or clean data, are of first order.

    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """

    order: int = 2
    history: int = 1
    jumps: bool = False

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows, previous = [], math.inf
        for t, s in pairwise(times):
            r, m = first_order(path, t, s)
            h = log_snr_step(path, t, s)
            c = 0.5 * h / previous if math.isfinite(h) and math.isfinite(previous) else 0.0
            weights = {"x": r, "denoised": m * (1 + c)} | ({"h1": -m * c} if c else {})
            rows.append(Row(t, t, weights, to_history={"denoised": 1.0}))
            previous = h
        return tuple(rows)


@dataclass(frozen=True)
class DPMppSDE:
    """SDE-DPM-Solver++ with two stages a step; ``eta = 0`` is DPM-Solver++(2S).

    The stages walk one Brownian path: the first stage's noise is part of the second's. Steps that touch pure noise or
    clean data have one stage.

    Source: Lu et al. 2022, arXiv:2211.01095, sec. 5 and algorithm 1; the shared noise is as in k-diffusion.
    """

    eta: float = 1.0
    order: int = 2
    history: int = 0
    jumps: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise PlanError(f"eta is {self.eta!r}; allowed: 0 to 1")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows: list[Row] = []
        for i, (t, s) in enumerate(pairwise(times)):
            first, second = 2 * i, 2 * i + 1
            if not math.isfinite(log_snr_step(path, t, s)):
                weights = ddim_weights(path, t, s, self.eta)
                rows.append(Row(t, t, weights, draws=(first if "n1" in weights else None, None)))
                continue
            middle = path.time((log_snr(path, t) + log_snr(path, s)) / 2)
            stage = self._stage(path, t, middle, {"x": 1.0}, {"denoised": 1.0}, {"n1": 1.0})
            rows.append(Row(t, t, stage, {"anchor": 1.0}, None, False, self._draws(first, None)))
            ratio_t, ratio_m, ratio_s = (math.exp(-log_snr(path, v)) for v in (t, middle, s))
            share = (ratio_t - ratio_m) / (ratio_t - ratio_s)  # of the Brownian path that the first stage walked
            walk = {"n1": math.sqrt(share), "n2": math.sqrt(1 - share)}
            # the stage sits at half the log-SNR step, so 1 / (2 * 1/2) = 1: its estimate alone carries the step
            full = self._stage(path, t, s, {"anchor": 1.0}, {"denoised": 1.0}, walk)
            rows.append(Row(middle, middle, full, draws=self._draws(first, second)))
        return tuple(rows)

    def _draws(self, n1: int, n2: int | None) -> tuple[int | None, int | None]:
        return (n1, n2) if self.eta > 0 else (None, None)

    def _stage(self, path: Path, t: float, s: float, state: Weights, data: Weights, noise: Weights) -> Weights:
        """An ancestral first-order step: the noise level falls below ``s`` and fresh noise brings it back."""
        weights = ddim_weights(path, t, s, self.eta)
        sources = ((weights["x"], state), (weights["denoised"], data), (weights.get("n1", 0.0), noise))
        return {name: scale * value for scale, part in sources for name, value in part.items() if scale}
