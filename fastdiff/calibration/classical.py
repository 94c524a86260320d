"""Where a calibration begins: the best of the known samplers, and where dynamic programming puts the steps.

Nothing here needs gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastdiff.calibration.teacher import Passed
from fastdiff.calibration.walking import Family, Goal
from fastdiff.errors import PlanError
from fastdiff.sampling.grid import GRIDS, Grid
from fastdiff.sampling.parts import make_solver
from fastdiff.sampling.prediction import first_order
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.solvers.non_stationary import NonStationary, non_stationary

SOLVERS = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "unipc:order=3", "sa_solver:tau=0", "deis", "lms", "ipndm",
           "gradient_estimation", "dpm_2m", "res_multistep", "dpmpp_2s", "heun", "rk2")  # fmt: skip
SCOUTS = ("dpmpp_2m", "unipc", "gradient_estimation")  # they choose the grids for all others
GRIDS_KEPT, ORDERED = 4, 16  # grids, and samplers, that are looked at more closely


class Candidate(NamedTuple):
    """A known sampler as weights."""

    solver_name: str
    grid_name: str
    solver: Solver
    walk: NonStationary

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.solver_name} on {self.grid_name}"


def grids(family: Family) -> dict[str, Grid]:
    """All grids that need no more than a path and a number; shifts of several strengths, with two ends."""
    found = dict(GRIDS)
    for shift in (0.5, 0.7, 1.0, 1.5, 2.0, 3.0):
        for last in (None, 0.03):
            name = f"shift {shift:g} below 0.999" + ("" if last is None else f" from {last}")
            found[name] = functools.partial(GRIDS["shifted"], shift=shift, t_first=0.999, t_last=last)
    return found


def candidates(family: Family, calls: int, planned: Sequence[float]) -> Iterator[Candidate]:
    """Every known sampler of at most so many calls; ``planned`` are times from ``cheapest``."""
    seen = set()
    choices: dict[str, Grid] = grids(family) | {"planned": lambda path, n: tuple(planned) if n == calls else ()}
    for grid_name, grid in choices.items():
        for name in SOLVERS:
            solver = make_solver(name, {})
            for steps in range(calls, 0, -1):
                try:
                    times = grid(family.path, steps)
                    rows = solver.rows(family.path, times) if times else ()
                    if not 0 < len(rows) <= calls:
                        continue
                    walk = non_stationary(rows, times)
                except PlanError:
                    continue  # not for this path, or not for so many steps
                key = (walk.times, tuple(tuple(sorted(row.items())) for row in walk.weights))
                if key not in seen:
                    seen.add(key)
                    yield Candidate(name, grid_name, solver, walk)
                break


def cheapest(passed: Passed, family: Family, calls: int) -> tuple[float, ...]:
    """Times of so many first-order steps between places of the teacher's way that are wrong by least in all.

    Source: Chen et al. 2024, arXiv:2405.11326, sec. 3 (dynamic programming over the cost of every step).
    """
    last = len(passed.times) - 1
    points = [*passed.states, passed.end]
    cost = np.full((last + 1, last + 1), np.inf)
    for i in range(last):
        for j in range(i + 1, last + 1):
            r, m = first_order(family.path, passed.times[i], passed.times[j])
            gap = r * passed.states[i] + m * passed.estimates[i] - points[j]
            cost[i, j] = float(gap.square().mean().sqrt())
    total = np.full((calls + 1, last + 1), np.inf)
    total[0, 0] = 0.0
    came = np.zeros((calls + 1, last + 1), dtype=int)
    for n in range(1, calls + 1):
        ways = total[n - 1][:, None] + cost
        came[n], total[n] = ways.argmin(0), ways.min(0)
    where = [last]
    for n in range(calls, 0, -1):
        where.append(int(came[n, where[-1]]))
    return tuple(passed.times[i] for i in reversed(where))


def ranked(calls: int, way: Passed, few: Goal, more: Goal) -> list[Candidate]:
    """The most accurate of the known samplers, best first.

    Args:
        calls: at most so many.
        way: of the teacher, for the planned times.
        few: images on which a few solvers try every grid, and all solvers the grids that served these best.
        more: images that order the best of them.
    """
    found = list(candidates(few.family, calls, cheapest(way, few.family, calls)))
    errors = {one.name: few.error(one.walk) for one in found if one.solver_name in SCOUTS}
    best: dict[str, float] = {}
    for one in found:
        if one.name in errors:
            best[one.grid_name] = min(errors[one.name], best.get(one.grid_name, math.inf))
    kept = sorted(best, key=lambda grid: best[grid])[:GRIDS_KEPT]
    chosen = [one for one in found if one.grid_name in kept]
    errors |= {one.name: few.error(one.walk) for one in chosen if one.name not in errors}
    chosen = sorted(chosen, key=lambda one: errors[one.name])[:ORDERED]
    ordered = sorted((more.error(one.walk), i) for i, one in enumerate(chosen))
    return [chosen[i] for _, i in ordered]
