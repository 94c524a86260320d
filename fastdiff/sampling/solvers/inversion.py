"""From an image to the noise that leads to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers.base import Row
from fastdiff.sampling.solvers.exponential import NOISE, Form, spell


@dataclass(frozen=True)
class DDIMInversion:
    """DDIM walked upwards: the times are taken in reverse, from clean data to noise.

    Where a step starts the network is told that time. Clean data has no noise to estimate, so the first step asks at
    its end; diffusers asks there at every step (``told="end"``).

    Source: Song et al. 2020, arXiv:2010.02502, sec. 4.3; Mokady et al. 2022, arXiv:2211.09794, eq. 3.
    """

    told: str = "start"
    order: int = field(default=1, init=False)
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.told not in ("start", "end"):
            raise PlanError(f"told is {self.told!r}; allowed: 'start', 'end'")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows = []
        for t, s in pairwise(reversed(times)):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
            now = t if self.told == "start" and sigma_t > 0 else s
            kept = alpha_s / alpha_t
            weights = spell({"x": kept, NOISE: sigma_s - kept * sigma_t}, Form("noise"), path, now)
            rows.append(Row(now, now, weights))
        return tuple(rows)
