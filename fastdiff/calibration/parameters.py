"""What is fitted: step times, and corrections to the weights that a classical solver has over these times.

Times are broken off a stick in the logarithm of the noise's angle ``atan2(sigma, alpha)``, which is finite at pure
noise and equally fine at every level near the data: whatever the numbers, times fall. Corrections start at zero, so
that a fit starts at exactly the classical sampler. All of it is float64, on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.solvers.non_stationary import NonStationary, non_stationary, registers

LEAST = 1e-3  # share of an angle that a step takes, and leaves
NUDGE = 1e-5  # of an angle's logarithm, for the theory's derivatives


def angle(path: Path, t: float) -> float:
    """Logarithm of ``atan2(sigma, alpha)``."""
    alpha, sigma = path.alpha_sigma(t)
    return math.log(math.atan2(sigma, alpha))


def time_of(path: Path, value: float) -> float:
    """The time of an angle's logarithm."""
    return path.time(-math.log(math.tan(math.exp(value))))


def names(calls: int) -> list[tuple[int, str]]:
    """The weights of a walk in order: row and register."""
    return [(i, name) for i in range(calls) for name in registers(i)]


@dataclass(frozen=True)
class Parameters:
    """A walk as numbers to be fitted.

    Args:
        path: the forward process.
        solver: whose weights are corrected; where its formula does not reach, they stand alone.
        last: where the walk ends; stays.
        angles: ``[N]`` logarithms of the angles of the evaluations.
        corrections: ``[W]``, added to the solver's weights.
        scale: standard deviation of the starting noise over that of the path's marginal there.
    """

    path: Path
    solver: Solver
    last: float
    angles: np.ndarray
    corrections: np.ndarray
    scale: float = 1.0

    @classmethod
    def of(cls, path: Path, solver: Solver, walk: NonStationary) -> Parameters:
        """The parameters of a classical walk."""
        angles = np.array([angle(path, t) for t in walk.times[:-1]])
        start = cls(path, solver, walk.times[-1], angles, np.zeros(len(names(len(walk.weights)))))
        given = np.array([walk.weights[i].get(name, 0.0) for i, name in names(len(walk.weights))])
        # zero but for the rounding of the times' way through angles; all of the weight for solvers that ask twice at a
        # time, whose formula knows no other
        return replace(start, corrections=given - start.theory(angles))

    def times(self, angles: np.ndarray) -> tuple[float, ...]:
        """Those of the angles, and the last."""
        top = angle(self.path, self.path.t_start)
        return (*(time_of(self.path, value) if value < top else self.path.t_start for value in angles), self.last)

    def theory(self, angles: np.ndarray) -> np.ndarray:
        """The solver's weights over the times of these angles, ``[W]``; zero where it has none."""
        times = self.times(angles)
        calls = len(angles)
        try:
            walk = non_stationary(self.solver.rows(self.path, times), times)
        except PlanError:
            walk = None
        if walk is None or len(walk.weights) != calls:
            return np.zeros(len(names(calls)))
        return np.array([walk.weights[i].get(name, 0.0) for i, name in names(calls)])

    def theory_rates(self) -> np.ndarray:
        """``[W, N]``: how the theory's weights change with each angle."""
        found = np.zeros((len(self.corrections), len(self.angles)))
        here = self.theory(self.angles)
        for k in range(len(self.angles)):
            step = np.zeros(len(self.angles))
            step[k] = NUDGE
            found[:, k] = (here - self.theory(self.angles - step)) / NUDGE
        return found

    def stick(self) -> np.ndarray:
        """``[N, N]``: how the angles change with the first of them and the stick's logits."""
        kept = np.exp(np.diff(self.angles))  # share of the angle that each step leaves
        found = np.ones((len(self.angles),) * 2)
        found[:, 1:] = np.tril(np.tile(1 - kept, (len(self.angles), 1)), -1)
        return found

    def moved(self, change: np.ndarray) -> Parameters:
        """The parameters after a change ``[W + 1 + N]``: corrections, logarithm of the scale, first angle, logits."""
        corrections, scale, first, logits = np.split(change, np.cumsum([len(self.corrections), 1, 1]))
        top = min(self.angles[0] + float(first[0]), angle(self.path, self.path.t_start))
        kept = np.clip(np.exp(np.diff(self.angles)), LEAST, 1 - LEAST)
        shares = 1 / (1 + np.exp(-(np.log(kept / (1 - kept)) + logits)))
        angles = np.concatenate([[top], top + np.cumsum(np.log(shares))])
        return replace(
            self,
            angles=angles,
            corrections=self.corrections + corrections,
            scale=self.scale * math.exp(float(scale[0])),
        )

    def walk(self) -> NonStationary:
        """The walk that they stand for."""
        weights = self.theory(self.angles) + self.corrections
        rows: list[dict[str, float]] = [{} for _ in range(len(self.angles))]
        for (i, name), weight in zip(names(len(rows)), weights.tolist(), strict=True):
            rows[i][name] = weight
        return NonStationary(self.times(self.angles), tuple(rows), self.scale)
