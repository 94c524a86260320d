"""Walks of a batch by samplers that are still being looked for, through the loop that samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from fastdiff.sampling.solvers.non_stationary import NonStationary

# A sampler -> a run of one batch before its first evaluation: the same noise and conditioning every time
Begin = Callable[[Planner], Ready]
Features = Callable[[Tensor], Tensor]  # [B, C, H, W] -> [B, ...]


class Family(NamedTuple):
    """What all walks of one network share."""

    path: Path
    prediction: Prediction


@dataclass(frozen=True)
class Given:
    """A solver over given times, as a ``Planner``; ``scale`` is that of ``NonStationary``."""

    family: Family
    solver: Solver
    times: tuple[float, ...]
    scale: float = 1.0

    def plan(self, num_inference_steps: int | None = None, **ignored: object) -> Plan:
        """See ``Planner.plan``."""
        scale = self.scale * initial_scale(self.family.path, self.times[0])
        return Plan(*self.family, self.solver, self.times, scale)


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
        scale = solver.scale if isinstance(solver, NonStationary) else 1.0
        self.ready = begin(Given(family, Remembering(solver), times, scale))

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


class Goal(NamedTuple):
    """Batches, and where their walks are to end."""

    begins: Sequence[Begin]
    truths: Sequence[Tensor]
    family: Family
    features: Features | None = None

    def error(self, walk: NonStationary) -> float:
        """Error over all batches, of images and features."""
        ends = [self.seen(Walk(begin, self.family, walk, walk.times).end()) for begin in self.begins]
        return relative(ends, [self.seen(truth) for truth in self.truths])

    def part(self, count: int) -> Goal:
        """The first so many batches alone."""
        return self._replace(begins=self.begins[:count], truths=self.truths[:count])

    def seen(self, x: Tensor) -> Tensor:
        """What is compared: images ``[B, C, H, W]``, followed by their features."""
        if self.features is None:
            return x.float()
        with torch.no_grad():
            found = self.features(x.float())
        # both parts count alike, whatever their number of values
        parts = [x.float().flatten(1), found.float().flatten(1)]
        return torch.cat([part / part.shape[1] ** 0.5 for part in parts], 1)


def relative(ends: list[Tensor], truths: list[Tensor]) -> float:
    """Root mean square error over batches, relative to the solution's own size; infinite where it is not a number."""
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ends, truths, strict=True))
    size = sum(float(b.double().square().sum()) for b in truths)
    error = (wrong / size) ** 0.5
    return error if error == error else float("inf")
