"""Few-step sampling that jumps to an estimate of clean data and adds noise again: LCM, Turbo, DMD2, TCD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import DiscreteVP, Path
from fastdiff.sampling.solvers.base import Row, ddim_weights, renoised_weights


@dataclass(frozen=True)
class Renoise:
    """``x_s = alpha_s D + sigma_s z``: every step starts from fresh noise. For networks distilled to few steps.

    Source: Song et al. 2023, arXiv:2303.01469, algorithm 1; LCM, arXiv:2310.04378, algorithm 3; the same in
    SD-Turbo (arXiv:2311.17042, sec. 3) and DMD2 (arXiv:2405.14867, sec. 4.4).
    """

    order: int = field(default=1, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows = []
        for i, (t, s) in enumerate(pairwise(times)):
            alpha, sigma = path.alpha_sigma(s)
            weights = {"denoised": alpha} | ({"n1": sigma} if sigma else {})
            rows.append(Row(t, path.t_end, weights, draws=(i if sigma else None, None)))
        return tuple(rows)


@dataclass(frozen=True)
class TCD:
    """Step down to ``(1 - gamma) s`` with the network's estimate, then noise back up to ``s``.

    The middle is measured in time; on lists of betas in whole steps, as the published code counts them.

    Source: Zheng et al. 2024, arXiv:2402.19159, algorithm 4.

    Args:
        gamma: share of fresh noise: 0 is DDIM, 1 is ``Renoise`` (diffusers calls it ``eta``).
    """

    gamma: float = 0.3
    order: int = field(default=1, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise PlanError(f"gamma is {self.gamma!r}; allowed: 0 to 1")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        return tuple(self._row(path, i, t, s) for i, (t, s) in enumerate(pairwise(times)))

    def _row(self, path: Path, i: int, t: float, s: float) -> Row:
        if self.gamma == 0 or path.alpha_sigma(s)[1] == 0:
            return Row(t, s, ddim_weights(path, t, s))
        middle = path.t_end + (1 - self.gamma) * (s - path.t_end)
        if isinstance(path, DiscreteVP) and s == int(s):
            middle = math.floor((1 - self.gamma) * path.timestep(s)) + 1  # the published count of trained steps
        return Row(t, middle, renoised_weights(path, t, middle, s), draws=(i, None))
