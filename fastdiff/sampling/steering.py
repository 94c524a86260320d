"""Which rows of which image are guided, and with which numbers: decided on the host, before the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

from fastdiff.errors import PlanError
from fastdiff.sampling.guidance import PLAIN, Numbers, Rule
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import MeanVelocity, Prediction
from fastdiff.sampling.solvers.base import Row, Solver

Strength = float | Callable[[float], float]  # constant, or by time; 1 means no guidance
Interval = tuple[float, float]  # noise levels sigma / alpha, above the first and up to the second


class Steering(NamedTuple):
    """The guidance of a batch, as asked for."""

    strengths: list[Strength]  # one for all images, or one for each
    rule: Rule
    rescale: float
    interval: Interval | None

    @classmethod
    def checked(
        cls, strength: Strength | Sequence[Strength], rule: Rule, rescale: float, interval: Interval | None
    ) -> Steering:
        """Check what was asked for.

        Raises:
            PlanError: naming what is out of range.
        """
        strengths = list(strength) if isinstance(strength, Sequence) else [strength]
        if not strengths:
            raise PlanError("guidance_scale is an empty sequence; allowed: a number, a function, or one for each image")
        for value in strengths:
            if not callable(value):
                _finite(value)
        if not isinstance(rescale, Real) or not 0 <= rescale <= 1:
            raise PlanError(f"guidance_rescale is {rescale!r}; allowed: 0 to 1")
        if interval is not None:
            ends = list(interval) if isinstance(interval, Sequence) else []
            if len(ends) != 2 or not all(isinstance(end, Real) for end in ends) or not 0 <= ends[0] < ends[1]:
                raise PlanError(
                    f"guidance_interval is {interval!r}; allowed: two noise levels sigma / alpha, 0 or more, rising"
                )
        return cls(strengths, rule, float(rescale), interval)

    def over(
        self, path: Path, solver: Solver, rows: Sequence[Row], silent: Sequence[bool]
    ) -> list[list[Numbers | None]]:
        """Return the numbers of each row, for each strength; None where a row needs the strong estimate alone.

        Args:
            path: gives the noise level of a row.
            solver: is named where it does not fit the rule.
            rows: of the solver.
            silent: rows at which the network is not asked.

        Raises:
            PlanError: if the rule does not fit the solver or a strength, or if options guide nothing.
        """
        found = []
        for strength in self.strengths:
            found.append(
                [None if mute else self._at(path, row, strength) for row, mute in zip(rows, silent, strict=True)]
            )
        guided = [(row, numbers) for image in found for row, numbers in zip(rows, image, strict=True) if numbers]
        if not guided and (self.rule != PLAIN or self.rescale or self.interval is not None):
            levels = [_noise_level(path, row.t) for row in rows]
            raise PlanError(
                f"guidance is set up but guides no row: guidance_scale is {self.strengths}, guidance_interval "
                f"{self.interval}, and the noise levels of the rows are {levels[0]:.3g} to {levels[-1]:.3g}"
            )
        if any(numbers.weak_noise and "raw" not in row.to_x for row, numbers in guided):
            raise PlanError(
                f"{type(self.rule).__name__} takes the noise from the unconditional estimate, and "
                f"{type(solver).__name__} does not write noise and data apart: use DDIM(keep_noise=True)"
            )
        return found

    def _at(self, path: Path, row: Row, strength: Strength) -> Numbers | None:
        if self.interval is not None:
            low, high = self.interval
            if not low < _noise_level(path, row.t) <= high:
                return None
        scale = _finite(strength(row.t), f" at t={row.t}") if callable(strength) else strength
        return self.rule.numbers(float(scale), self.rescale)


def silent_rows(path: Path, prediction: Prediction, rows: Sequence[Row], rule: Rule) -> list[bool]:
    """Which rows belong to the rule's first steps, where the network's output is taken for zero.

    Raises:
        PlanError: if a zero output does not stand for a velocity of zero, or no step is left.
    """
    steps, ended, silent = rule.zero_init_steps, 0, []
    for row in rows:
        silent.append(ended < steps)
        ended += row.ends
        still = MeanVelocity().coefficients(path, row.t, row.s).c_skip if silent[-1] else 0.0
        if silent[-1] and not math.isclose(prediction.coefficients(path, row.t, row.s).c_skip, still, rel_tol=1e-9):
            raise PlanError(
                f"zero_init_steps is {steps}, which means a velocity of zero; an output of zero means something else "
                f"for {type(prediction).__name__} on this path: use CFGZeroStar(zero_init_steps=0)"
            )
    if all(silent):
        raise PlanError(f"zero_init_steps is {steps} of {ended} steps; allowed: less than all of them")
    return silent


def _noise_level(path: Path, t: float) -> float:
    alpha, sigma = path.alpha_sigma(t)
    return sigma / alpha if alpha else math.inf


def _finite(scale: float, where: str = "") -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise PlanError(f"guidance_scale is {scale!r}{where}; allowed: a finite number")
    return scale
