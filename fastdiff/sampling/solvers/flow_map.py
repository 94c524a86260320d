"""Few-step sampling with networks that jump: flow maps and consistency networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path, log_snr
from fastdiff.sampling.solvers.base import Row, ddim_weights, renoised_weights


@dataclass(frozen=True)
class FlowMap:
    """Jump from ``t`` to below ``s``, then add noise back up to ``s``.

    Args:
        gamma: share of fresh noise: 0 jumps straight to ``s``; 1 jumps to clean data and noises it again
            (consistency multistep); between them the jump ends where ``sigma / alpha`` is
            ``sqrt(1 - gamma^2)`` of its value at ``s``.

    Source: Kim et al. 2023, CTM, arXiv:2310.02279, algorithm 3 (gamma-sampling); gamma = 1 is Song et al. 2023,
    arXiv:2303.01469, algorithm 1.
    """

    gamma: float = 0.0
    order: int = field(default=1, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise PlanError(f"gamma is {self.gamma!r}; allowed: 0 to 1")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        return tuple(self._row(path, i, t, s) for i, (t, s) in enumerate(pairwise(times)))

    def _row(self, path: Path, i: int, t: float, s: float) -> Row:
        if self.gamma == 0 or path.alpha_sigma(s)[1] == 0:
            return Row(t, s, ddim_weights(path, t, s))
        landing = path.t_end
        if self.gamma < 1:
            landing = path.time(log_snr(path, s) - 0.5 * math.log1p(-(self.gamma**2)))
        return Row(t, landing, renoised_weights(path, t, landing, s), draws=(i, None))
