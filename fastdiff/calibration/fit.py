"""Fitting by the method of Levenberg and Marquardt.

Some sixty numbers are fitted to tens of thousands, by least squares: the case for Gauss-Newton steps. How the end of a
walk changes with each number is found by walking again from the row that reads it with that number nudged. This asks
the network for outputs alone, so it runs on every backend and holds the memory of sampling, where gradients through
the walk would need autograd and the memory of training.

Source: Levenberg 1944; Marquardt 1963, SIAM J. Appl. Math. 11, 431-441.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.calibration.parameters import Parameters, names
from fastdiff.calibration.walking import Goal, Walk
from fastdiff.sampling.loop import State
from fastdiff.sampling.solvers.non_stationary import START, NonStationary

TIME_NUDGE = 0.1  # share of the distance to the nearest other time: networks are rough in time
DAMPING, TRIES, PATIENCE = 1e-3, 6, 2
FARTHEST = 0.5  # change of a logit in one step: a nudge says nothing of a stick broken elsewhere altogether
FIRST = 0.03  # likewise, of the first angle's logarithm
TINY = 1e-12
LITTLE, ENOUGH = 0.02, 2e-3  # gain of a step, as a share of the error, below which more images are asked; a fit ends


class Progress(NamedTuple):
    """Where a fit stands after a step."""

    parameters: Parameters
    error: float
    damping: float
    step: int


def columns(goal: Goal, number: int, at: Parameters, nudge: float) -> tuple[Tensor, Tensor]:
    """How one batch's end changes with every weight, the scale and every angle: ``[V, W + 1 + N]``, and what it
    lacks, ``[V]``.

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
    louder = NonStationary(solver.times, solver.weights, solver.scale * math.exp(nudge))
    rise(Walk(begin, family, louder, solver.times).end(), nudge)
    for k in range(calls):
        step = -TIME_NUDGE * _room(at, k)
        angles = at.angles.copy()
        angles[k] += step
        times = at.times(angles)
        # the first time changes the scale of the noise with it
        later = Walk(begin, family, NonStationary(times, solver.weights, solver.scale), times)
        rise(later.end(k, states[k]) if k else later.end(), step)
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
    edges = [*at.angles, at.angles[-1] - 1.0]
    return float(min(edges[i] - edges[i + 1] for i in (k - 1, k) if i >= 0))


def normal(goal: Goal, batches: Sequence[int], at: Parameters, nudge: float) -> tuple[np.ndarray, np.ndarray]:
    """The normal equations over batches, in what ``Parameters.moved`` takes: ``[P, P]`` and ``[P]``."""
    weights, times = len(at.corrections), len(at.corrections) + 1
    square = np.zeros((times + len(at.angles),) * 2)
    right = np.zeros(len(square))
    for number in batches:
        rises, lack = columns(goal, number, at, nudge)
        square += (rises.T @ rises).double().cpu().numpy()
        right += (rises.T @ lack).double().cpu().numpy()
    # a time moves the theory's weights too, and a logit all times after it
    change = np.eye(len(square))
    change[:weights, times:] = at.theory_rates()
    change[:, times:] = change[:, times:] @ at.stick()
    return change.T @ square @ change, change.T @ right


def fit(goal: Goal, start: Parameters, *, iterations: int, share: int, nudge: float, seed: int) -> Iterator[Progress]:
    """Improve parameters until they improve no more; yields every step that did.

    Args:
        goal: what to fit. Every step is judged on all of it, and computed from a part: few images say where to go, and
            other ones each time keep a fit out of valleys that are only some images'.
        start: where to begin.
        iterations: steps at most.
        share: batches that the first steps are computed from, drawn anew for each; twice as many after every step
            that gained little, up to half of them all.
        nudge: size of changes relative to the state: well above the network's rounding.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    here = Progress(start, goal.error(start.walk()), DAMPING, 0)
    stuck = 0
    for number in range(1, iterations + 1):
        batches = draw.permutation(len(goal.begins))[:share].tolist()
        found = _step(goal, here, *normal(goal, batches, here.parameters, nudge))
        gain = here.error - found.error
        here = found._replace(step=number)
        if gain > 0:
            yield here
        stuck = stuck + 1 if gain < ENOUGH * here.error else 0
        if stuck == PATIENCE or (stuck and share >= len(goal.begins)):  # other batches may know a better way
            return
        if gain < LITTLE * here.error:
            share = max(share, min(2 * share, len(goal.begins) // 2))


def _step(goal: Goal, here: Progress, square: np.ndarray, right: np.ndarray) -> Progress:
    """The first damped step that lessens the error; where none does, no step, and a start from more damping."""
    if not np.isfinite(square).all() or not np.isfinite(right).all():
        return here  # a walk of some batch ends in NaN
    scale = np.sqrt(np.maximum(np.diag(square), 1e-30))
    first, damping = len(here.parameters.corrections) + 1, here.damping
    tried = 0
    while tried < TRIES:
        damped = square / scale[:, None] / scale + damping * np.eye(len(square))
        change = np.linalg.solve(damped, right / scale) / scale
        if abs(change[first]) <= FIRST and np.abs(change[first + 1 :]).max(initial=0.0) <= FARTHEST:
            tried += 1
            moved = here.parameters.moved(change)
            error = goal.error(moved.walk())
            if error < here.error:
                return Progress(moved, error, max(damping / 5, 1e-7), here.step)
        damping *= 4
    return here._replace(damping=damping / 4**3)
