"""Walks of a batch by samplers that are still being looked for, through the loop that samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.sampling import loop
from fastdiff.sampling.loop import State
from fastdiff.sampling.parts import initial_scale
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import Prediction
from fastdiff.sampling.run import Plan, Planner, Ready
from fastdiff.sampling.solvers import Row, Solver

# A sampler -> a run of one batch before its first evaluation: the same noise and conditioning every time
Begin = Callable[[Planner], Ready]


class Family(NamedTuple):
    """What all walks of one network share."""

    path: Path
    prediction: Prediction


@dataclass(frozen=True)
class Given:
    """A solver over given times, as a ``Planner``."""

    family: Family
    solver: Solver
    times: tuple[float, ...]

    def plan(self, num_inference_steps: int | None = None, **ignored: object) -> Plan:
        """See ``Planner.plan``."""
        return Plan(*self.family, self.solver, self.times, initial_scale(self.family.path, self.times[0]))


@dataclass(frozen=True)
class Remembering:
    """A solver whose every estimate is kept as the newest of the history: fitting wants to see them all."""

    solver: Solver
    order: int = 1
    jumps: bool = False

    @property
    def history(self) -> int:
        """See ``Solver.history``."""
        return max(self.solver.history, 1)

    def rows(self, path: Path, times: tuple[float, ...]) -> tuple[Row, ...]:
        """See ``Solver.rows``."""
        rows = self.solver.rows(path, times)
        return tuple(row if row.to_history else row._replace(to_history={"denoised": 1.0}) for row in rows)


class Walk:
    """One batch on one walk, prepared once, to be gone along from any of its rows."""

    def __init__(self, begin: Begin, family: Family, solver: Solver, times: tuple[float, ...]):
        self.ready = begin(Given(family, Remembering(solver), times))

    @torch.no_grad()
    def states(self, row: int = 0, state: State | None = None) -> Iterator[State]:
        """What the state is after each row from ``row`` on, starting from ``state``."""
        ready, state = self.ready, state or self.ready.state
        yield from loop.iterate(
            ready.denoiser, state.x, ready.table, ready.noise, ready.prepared, first=row, state=state
        )

    def end(self, row: int = 0, state: State | None = None) -> Tensor:
        """Where the walk ends, ``[B, C, H, W]``."""
        x = (state or self.ready.state).x
        for later in self.states(row, state):
            x = later.x
        return x


def relative(ends: list[Tensor], truths: list[Tensor]) -> float:
    """Root mean square error over batches, relative to the solution's own size; infinite where it is not a number."""
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ends, truths, strict=True))
    size = sum(float(b.double().square().sum()) for b in truths)
    error = (wrong / size) ** 0.5
    return error if error == error else float("inf")
