"""What a grid is, and the checks that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import DiscreteVP, Path

Times = tuple[float, ...]
MAX_STEPS = 10_000  # the tables of more would not fit anywhere useful
Grid = Callable[[Path, int], Times]
ROUNDING = 1e-5  # of the path's length: published times and noise levels are float32 or have five digits


def need_steps(n: int) -> None:
    """Raise ``PlanError`` unless ``n`` is a number of steps."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_STEPS:
        raise PlanError(f"num_inference_steps is {n!r}; allowed: a whole number from 1 to {MAX_STEPS}")


def falling(path: Path, times: Sequence[float], n: int) -> Times:
    """Return the times of a grid.

    Raises:
        PlanError: if two of them coincide or leave the path, which says that ``n`` is too many for this grid.
    """
    if any(not a > b for a, b in pairwise(times)) or times[0] > path.t_start:
        raise PlanError(
            f"num_inference_steps is {n}; allowed: fewer on this grid, two of its times coincide or it leaves the path"
        )
    return tuple(times)


def trained_steps(path: Path, n: int) -> int:
    """Return how many steps the path was trained with.

    Raises:
        PlanError: if it has none, or fewer than ``n``.
    """
    need_steps(n)
    if not isinstance(path, DiscreteVP):
        raise PlanError(
            f"this grid counts trained steps, which a {type(path).__name__} path does not have: use 'uniform'"
        )
    total = len(path.betas)
    if n > total:
        raise PlanError(f"num_inference_steps is {n}; this path has {total} trained steps, so at most {total}")
    return total


def uniform(path: Path, n: int) -> Times:
    """Equal steps in ``t`` from ``t_start`` to ``t_end``."""
    need_steps(n)
    span = path.t_end - path.t_start
    return tuple(path.t_start + span * (i / n) for i in range(n)) + (path.t_end,)


def explicit(path: Path, times: Sequence[float]) -> Times:
    """Check times given by the user; ``t_end`` is added where they stop above it.

    A first time above ``t_start`` by no more than the rounding of float32 is ``t_start``.

    Raises:
        PlanError: if they do not fall strictly, are not finite, or leave the path.
    """
    values = tuple(float(t) for t in times)
    if not values or not all(math.isfinite(t) for t in values):
        raise PlanError(f"times are {list(values)}; allowed: one or more finite numbers")
    if path.t_start < values[0] <= path.t_start + ROUNDING * (path.t_start - path.t_end):
        values = (path.t_start, *values[1:])
    if values[-1] > path.t_end:
        values += (path.t_end,)
    if any(a <= b for a, b in pairwise(values)):
        raise PlanError(f"times are {list(values)}; they must fall strictly")
    if values[0] > path.t_start or values[-1] < path.t_end:
        raise PlanError(f"times run from {values[0]} to {values[-1]}; allowed: {path.t_start} to {path.t_end}")
    return values
