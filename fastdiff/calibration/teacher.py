"""The solution that few-step samplers are compared with: the same ODE in many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from fastdiff.calibration.walking import Begin, Family, Walk, relative
from fastdiff.errors import PlanError
from fastdiff.sampling.parts import make_solver, make_times

SOLVER = "dpmpp_2m"  # of second order: a trained network is rough in time, where higher ones gain nothing


class Passed(NamedTuple):
    """A trajectory of one batch: the states at some times, what was estimated there, and the end."""

    times: tuple[float, ...]
    states: tuple[Tensor, ...]
    estimates: tuple[Tensor, ...]
    end: Tensor


def follow(begins: Sequence[Begin], family: Family, steps: int, kept: int, done: Callable[[int], None]) -> list[Passed]:
    """Solve every batch in ``steps`` steps; of the way of the first ``kept`` about 64 places are remembered.

    Args:
        begins: the batches.
        family: path and prediction.
        steps: of the usual grid of the path.
        kept: batches whose way is remembered.
        done: told of every batch how many evaluations it took.
    """
    times = make_times(family.path, steps)
    every = max(1, steps // 64)
    found = []
    for number, begin in enumerate(begins):
        walk = Walk(begin, family, make_solver(SOLVER, {}), times)
        x, states, estimates = walk.ready.state.x, [], []
        for i, state in enumerate(walk.states()):
            if number < kept and i % every == 0:
                states.append(x)
                estimates.append(state.history[0])
            x = state.x
        places = (*times[:-1:every], times[-1]) if number < kept else ()
        found.append(Passed(places, tuple(states), tuple(estimates), x))
        done(len(times) - 1)
    return found


def uncertainty(begin: Begin, family: Family, steps: int, truth: Tensor) -> float:
    """Relative difference of one batch's solution to one of half as many steps."""
    walk = Walk(begin, family, make_solver(SOLVER, {}), make_times(family.path, max(1, steps // 2)))
    return relative([walk.end()], [truth])


def check_steps(steps: int, largest: int) -> None:
    """Raise ``PlanError`` unless a teacher of so many steps can judge the largest sampler."""
    if steps < 4 * largest:
        raise PlanError(f"teacher_steps is {steps}; allowed: {4 * largest} or more, four times the largest of steps")
