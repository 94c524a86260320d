"""Fitting by the method of Levenberg and Marquardt.

Some sixty numbers are fitted to tens of thousands, by least squares: the case for Gauss-Newton steps. How the end of a
walk changes with each number is found by walking again from the row that reads it with that number nudged. This asks
the network for outputs alone, so it runs on every backend and holds the memory of sampling, where gradients through
the walk would need autograd and the memory of training.

Source: Levenberg 1944; Marquardt 1963, SIAM J. Appl. Math. 11, 431-441.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.calibration.parameters import Parameters, angle, names
from fastdiff.calibration.walking import Begin, Family, Walk, relative
from fastdiff.sampling.loop import State
from fastdiff.sampling.solvers.non_stationary import START, NonStationary

Features = Callable[[Tensor], Tensor]

TIME_NUDGE = 0.1  # share of the distance to the nearest other time: networks are rough in time
DAMPING, TRIES, PATIENCE = 1e-3, 10, 2
FARTHEST = 0.5  # change of a logit in one step: a nudge says nothing of a stick broken elsewhere altogether
TINY = 1e-12
ENOUGH = 2e-3  # gain of a step, as a share of the error, below which a fit ends


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

    def seen(self, x: Tensor) -> Tensor:
        """What is compared: images ``[B, C, H, W]``, followed by their features."""
        if self.features is None:
            return x.float()
        with torch.no_grad():
            found = self.features(x.float())
        # both parts count alike, whatever their number of values
        parts = [x.float().flatten(1), found.float().flatten(1)]
        return torch.cat([part / part.shape[1] ** 0.5 for part in parts], 1)


class Progress(NamedTuple):
    """Where a fit stands after a step."""

    parameters: Parameters
    error: float
    damping: float
    step: int


def columns(goal: Goal, number: int, at: Parameters, nudge: float) -> tuple[Tensor, Tensor]:
    """How one batch's end changes with every weight and angle: ``[V, W + N - 1]``, and what it lacks, ``[V]``.

    Args:
        goal: what is fitted.
        number: of the batch.
        at: where.
        nudge: size of the changes, relative to the state.
    """
    begin, family, solver = goal.begins[number], goal.family, at.walk()
    walk = Walk(begin, family, solver, solver.times)
    states = [walk.ready.state, *walk.states()]
    end = goal.seen(states[-1].x)
    calls, found = len(solver.weights), []

    def rise(x: Tensor, step: float) -> None:
        found.append(((goal.seen(x) - end) / step).flatten())

    for i, name in names(calls):
        direction = _register(states, i, name)
        # a register that holds nothing yet moves nothing
        size = max(float(direction.square().mean().sqrt()), TINY)
        step = nudge * float(states[i + 1].x.square().mean().sqrt()) / size
        nudged = states[i + 1]._replace(x=states[i + 1].x + step * direction)
        rise(walk.end(i + 1, nudged) if i + 1 < calls else nudged.x, step)
    for k in range(len(at.angles)):
        step = -TIME_NUDGE * _room(at, k)
        angles = at.angles.copy()
        angles[k] += step
        times = at.times(angles)
        later = NonStationary(times, solver.weights)
        rise(Walk(begin, family, later, times).end(k + 1, states[k + 1]), step)
    return torch.stack(found, 1), (goal.seen(goal.truths[number]) - end).flatten()


def _register(states: Sequence[State], row: int, name: str) -> Tensor:
    """What a register held when a row's sums were formed."""
    if name == START:
        return states[0].x
    if name == "x":
        return states[row].x
    age = 0 if name == "denoised" else int(name[1:])
    return states[row + 1].history[0] if age == 0 else states[row + 1 - age].history[0]


def _room(at: Parameters, k: int) -> float:
    """Distance of an angle's logarithm to its nearest neighbour."""
    edges = [angle(at.path, at.first), *at.angles]
    after = edges[k + 2] if k + 2 < len(edges) else edges[k + 1] - 1.0
    return float(min(edges[k] - edges[k + 1], edges[k + 1] - after))


def normal(goal: Goal, batches: Sequence[int], at: Parameters, nudge: float) -> tuple[np.ndarray, np.ndarray]:
    """The normal equations over batches, in stick logits and corrections: ``[P, P]`` and ``[P]``."""
    weights = len(at.corrections)
    square = np.zeros((weights + len(at.angles),) * 2)
    right = np.zeros(len(square))
    for number in batches:
        rises, lack = columns(goal, number, at, nudge)
        square += (rises.T @ rises).double().cpu().numpy()
        right += (rises.T @ lack).double().cpu().numpy()
    # a time moves the theory's weights too, and a logit all times after it
    change = np.eye(len(square))
    change[:weights, weights:] = at.theory_rates()
    change[:, weights:] = change[:, weights:] @ at.stick()
    return change.T @ square @ change, change.T @ right


def fit(goal: Goal, start: Parameters, *, iterations: int, share: int, nudge: float, seed: int) -> Iterator[Progress]:
    """Improve parameters until they improve no more; yields every step that did.

    Args:
        goal: what to fit. Every step is judged on all of it.
        start: where to begin.
        iterations: steps at most.
        share: batches that each step is computed from, drawn anew.
        nudge: size of changes relative to the state: well above the network's rounding.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    here = Progress(start, goal.error(start.walk()), DAMPING, 0)
    stuck = 0
    for number in range(1, iterations + 1):
        batches = draw.permutation(len(goal.begins))[:share].tolist()
        found = _step(goal, here, *normal(goal, batches, here.parameters, nudge))
        gain = 0.0 if found is None else here.error - found.error
        if found is not None:
            here = found._replace(step=number)
            yield here
        stuck = stuck + 1 if gain < ENOUGH * here.error else 0
        if stuck == PATIENCE or (stuck and share >= len(goal.begins)):  # other batches may know a better way
            return


def _step(goal: Goal, here: Progress, square: np.ndarray, right: np.ndarray) -> Progress | None:
    """The first damped step that lessens the error."""
    if not np.isfinite(square).all() or not np.isfinite(right).all():
        return None  # a walk of some batch ends in NaN
    scale = np.sqrt(np.maximum(np.diag(square), 1e-30))
    weights, damping = len(here.parameters.corrections), here.damping
    tried = 0
    while tried < TRIES:
        damped = square / scale[:, None] / scale + damping * np.eye(len(square))
        change = np.linalg.solve(damped, right / scale) / scale
        if np.abs(change[weights:]).max(initial=0.0) <= FARTHEST:
            tried += 1
            moved = here.parameters.moved(change[weights:], change[:weights])
            error = goal.error(moved.walk())
            if error < here.error:
                return Progress(moved, error, max(damping / 5, 1e-7), here.step)
        damping *= 4
    return None
