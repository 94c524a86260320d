"""PeRFlow: networks whose flow is straight inside each of a few windows of time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastdiff.errors import PlanError
from fastdiff.sampling.path import DiscreteVP, Path, RectifiedFlow, quadratic_betas
from fastdiff.sampling.prediction.base import Coefficients, Target, one_time

KINDS = ("ddim_eps", "diff_eps", "velocity")
SLACK = 1e-4  # of a window's bound, as published: a time this close below it counts as on it


@dataclass(frozen=True)
class PeRFlow:
    """A piecewise rectified flow, walked on the straight path by ``sampler="flow_map"``, ``grid="perflow"``.

    Time is cut into equal windows. Inside one the state runs straight from a point of the trained diffusion's marginal
    at the window's start to one at its end. A network of noise gives the noise that joins the two:

    - ``"ddim_eps"``: the end is the DDIM step from the start with this noise.
    - ``"diff_eps"``: the start is the end, diffused with this noise.
    - ``"velocity"``: the network gives the straight line's ``dx/dt`` itself.

    ``D`` is the point at time 0 that the line through the state runs to, so that a first-order step on the straight
    path follows that line. The path's ``alpha`` and ``sigma`` say nothing about the state, and a step that leaves its
    window is refused.

    Args:
        kind: what the network gives.
        windows: how many; as many as it was trained with.
        trained: the diffusion that was rectified; Stable Diffusion's by default.

    Source: Yan et al. 2024, arXiv:2405.07510; bounds and times as in the authors' scheduler, whose last window ends
    after the first trained step.
    """

    kind: str = "ddim_eps"
    windows: int = 4
    trained: DiscreteVP = field(default_factory=quadratic_betas)
    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"kind is {self.kind!r}; allowed: {', '.join(map(repr, KINDS))}")
        if not 1 <= self.windows <= len(self.trained.betas):
            raise PlanError(f"windows is {self.windows!r}; allowed: 1 to {len(self.trained.betas)}")

    def window(self, t: float) -> tuple[float, float]:
        """Return start and end of the window that a step from ``t`` walks in."""
        index = max(math.ceil((t - SLACK) * self.windows) - 1, 0)
        return (index + 1) / self.windows, index / self.windows

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        if not isinstance(path, RectifiedFlow):
            raise PlanError(f"a PeRFlow network is walked on the 'straight' path; this one is {path!r}")
        start, end = self.window(t)
        if not end - SLACK <= s < t:
            raise PlanError(
                f"a PeRFlow step cannot go from t={t!r} to {s!r}; allowed: down to {end!r}, where its window ends: use "
                "sampler 'flow_map' on grid 'perflow'"
            )
        if self.kind == "velocity":
            return Coefficients(1.0, 1.0, -t, *one_time(path, t))
        kept, noise = self._across(start, end)
        # the state is the mean of start and end by time: solve for the end
        weight = kept * (start - t) + t - end
        to_end, of_noise = kept * (start - end) / weight, noise * (t - end) / weight
        slope = t / (t - end)  # of the line through the state and the end, as far as time 0
        return Coefficients(1.0, 1 + slope * (to_end - 1), slope * of_noise, *one_time(path, t))

    def _across(self, start: float, end: float) -> tuple[float, float]:
        """The end of a window is ``kept * start + noise * F``."""
        (alpha_s, sigma_s), (alpha_e, sigma_e) = self._marginal(start), self._marginal(end)
        kept = alpha_e / alpha_s
        if self.kind == "ddim_eps":
            return kept, sigma_e - kept * sigma_s
        return kept, -math.sqrt(kept * kept - 1)

    def _marginal(self, t: float) -> tuple[float, float]:
        return self.trained.alpha_sigma(max(t * len(self.trained.betas), 1.0))

    def target(self, path: Path, t: float) -> Target:
        raise PlanError("a PeRFlow network is distilled from the ends of its windows: train 'eps' or 'v' first")
