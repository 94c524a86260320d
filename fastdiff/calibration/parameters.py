"""What is fitted: step times, and corrections to the weights that a classical solver has over these times.

Times are broken off a stick in the logarithm of the noise's angle ``atan2(sigma, alpha)``, which is finite at pure
noise and equally fine at every level near the data: whatever the numbers, times fall. Corrections start at zero, so
that a fit starts at exactly the classical sampler. All of it is float64, on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        solver: whose weights are corrected; None where its formula does not reach, then the weights stand alone.
        first, last: times that stay: of the first evaluation, and where the walk ends.
        angles: ``[N - 1]`` logarithms of the angles of the other evaluations.
        corrections: ``[W]``, added to the solver's weights.
    """

    path: Path
    solver: Solver
    first: float
    last: float
    angles: np.ndarray
    corrections: np.ndarray

    @classmethod
    def of(cls, path: Path, solver: Solver, walk: NonStationary) -> Parameters:
        """The parameters of a classical walk."""
        angles = np.array([angle(path, t) for t in walk.times[1:-1]])
        start = cls(path, solver, walk.times[0], walk.times[-1], angles, np.zeros(len(names(len(walk.weights)))))
        given = np.array([walk.weights[i].get(name, 0.0) for i, name in names(len(walk.weights))])
        # zero but for the rounding of the times' way through angles; all of the weight for solvers that ask twice at a
        # time, whose formula knows no other
        return start.moved(np.zeros(len(angles)), given - start.theory(angles))

    def times(self, angles: np.ndarray) -> tuple[float, ...]:
        """First time, those of the angles, last time."""
        return (self.first, *(time_of(self.path, value) for value in angles), self.last)

    def theory(self, angles: np.ndarray) -> np.ndarray:
        """The solver's weights over the times of these angles, ``[W]``; zero where it has none."""
        times = self.times(angles)
        calls = len(angles) + 1
        try:
            walk = non_stationary(self.solver.rows(self.path, times), times)
        except PlanError:
            walk = None
        if walk is None or len(walk.weights) != calls:
            return np.zeros(len(names(calls)))
        return np.array([walk.weights[i].get(name, 0.0) for i, name in names(calls)])

    def theory_rates(self) -> np.ndarray:
        """``[W, N - 1]``: how the theory's weights change with each angle."""
        found = np.zeros((len(self.corrections), len(self.angles)))
        for k in range(len(self.angles)):
            step = np.zeros(len(self.angles))
            step[k] = NUDGE
            found[:, k] = (self.theory(self.angles + step) - self.theory(self.angles - step)) / (2 * NUDGE)
        return found

    def stick(self) -> np.ndarray:
        """``[N - 1, N - 1]``: how the angles change with the stick's logits."""
        edges = np.array([angle(self.path, self.first), *self.angles])
        kept = np.exp(np.diff(edges))  # share of the angle that each step leaves
        return np.tril(np.tile(1 - kept, (len(self.angles), 1)))

    def moved(self, logits: np.ndarray, corrections: np.ndarray) -> Parameters:
        """The parameters after a change of the stick's logits and of the corrections."""
        edges = np.array([angle(self.path, self.first), *self.angles])
        kept = np.clip(np.exp(np.diff(edges)), LEAST, 1 - LEAST)
        shares = 1 / (1 + np.exp(-(np.log(kept / (1 - kept)) + logits)))
        angles = edges[0] + np.cumsum(np.log(shares)) if logits.any() else self.angles
        return Parameters(self.path, self.solver, self.first, self.last, angles, self.corrections + corrections)

    def walk(self) -> NonStationary:
        """The walk that they stand for."""
        weights = self.theory(self.angles) + self.corrections
        rows: list[dict[str, float]] = [{} for _ in range(len(self.angles) + 1)]
        for (i, name), weight in zip(names(len(rows)), weights.tolist(), strict=True):
            rows[i][name] = weight
        return NonStationary(self.times(self.angles), tuple(rows))
