"""Non-stationary solvers: walks without fresh noise whose weights are given, number by number.

Whatever a deterministic solver does, the state it shows the network is a weighted sum of the state it started from
and of the estimates made so far. ``written_out`` finds these sums for any of them, and ``NonStationary`` walks by such
weights, which nothing ties to a formula: what a calibrated sampler is.

Source: Shaul et al. 2024, arXiv:2403.01329, sec. 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers.base import Row, Weights

START = "anchor"  # the state that a walk of given weights started from stays in this register
MAX_HISTORY = 4  # estimates that a walk of given weights looks back on; an engine provides as many registers


def registers(row: int) -> tuple[str, ...]:
    """What a walk of given weights reads at a row. Early states are sums of the others, so they are left out."""
    known = (START, "denoised", *(f"h{age}" for age in range(1, min(row, MAX_HISTORY) + 1)))
    return known if row <= MAX_HISTORY else ("x", *known)


@dataclass(frozen=True)
class NonStationary:
    """A walk of given weights over its own times.

    Args:
        times: of the evaluations, and where the walk ends; they never rise.
        weights: for each evaluation, the weights of ``registers`` that make the next state.
        scale: standard deviation of the starting noise over that of the path's marginal at the first time; for whoever
            plans the run, as rows know nothing of its start.
    """

    times: tuple[float, ...]
    weights: tuple[Mapping[str, float], ...]
    scale: float = 1.0
    order: int = 1
    jumps: bool = False

    @property
    def history(self) -> int:
        """See ``Solver.history``."""
        return min(len(self.weights) - 1, MAX_HISTORY)

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        """See ``Solver.rows``.

        Raises:
            PlanError: on times other than its own: its weights belong to them.
        """
        if tuple(times) != self.times:
            raise PlanError(
                f"this sampler walks {len(self.weights)} steps of its own, whole; it got {len(times) - 1} steps from "
                f"t={times[0]:g}: give it no strength, timesteps or sigmas"
            )
        last = len(self.weights) - 1
        return tuple(
            Row(t, t, weights, {START: 1.0}, {"denoised": 1.0} if i < last else None)
            for i, (t, weights) in enumerate(zip(self.times, self.weights, strict=False))
        )


def written_out(rows: Sequence[Row]) -> np.ndarray:
    """The sums that a walk of ``rows`` forms, ``[N, 1 + N]``: weights of the start and of each estimate.

    Raises:
        PlanError: if the walk draws noise, reads estimates before clipping, or asks a network for jumps.
    """
    count = len(rows)
    basis = np.eye(1 + count)
    x = anchor = basis[0]
    history: list[np.ndarray] = []
    sums = []
    for i, row in enumerate(rows):
        if row.draws != (None, None) or row.s != row.t or row.learned:
            raise PlanError("a walk that draws noise, or jumps, cannot be written out")
        known = {"x": x, "anchor": anchor, "denoised": basis[1 + i], **{f"h{k}": h for k, h in enumerate(history, 1)}}
        try:
            x, anchor, kept = (
                None if weights is None else sum((v * known[k] for k, v in weights.items() if v), 0 * basis[0])
                for weights in (row.to_x, row.to_x if row.to_anchor is None else row.to_anchor, row.to_history)
            )
        except KeyError as error:
            raise PlanError(f"a walk that reads {error} cannot be written out") from error
        history = history if kept is None else [kept, *history]
        sums.append(x)
    return np.array(sums)


def non_stationary(rows: Sequence[Row], times: Sequence[float]) -> NonStationary:
    """The walk of given weights that does what ``rows`` do over ``times``.

    Raises:
        PlanError: if no weights of ``registers`` do, or a row goes back up.
    """
    walked = (*(row.t for row in rows), times[-1])
    if any(a < b for a, b in pairwise(walked)):
        raise PlanError(f"a walk of given weights never rises; this one goes through {list(walked)[:6]}...")
    sums = written_out(rows)
    basis = np.eye(1 + len(rows))
    found: list[Weights] = []
    for i, wanted in enumerate(sums):
        known = {"x": sums[i - 1] if i else basis[0], START: basis[0], "denoised": basis[1 + i]}
        known |= {f"h{age}": basis[1 + i - age] for age in range(1, i + 1)}
        names = registers(i)
        spanned = np.array([known[name] for name in names]).T
        weights = np.linalg.lstsq(spanned, wanted, rcond=None)[0]
        if np.abs(spanned @ weights - wanted).max() > 1e-9 * max(1.0, np.abs(wanted).max()):
            raise PlanError(f"this walk looks back further than {MAX_HISTORY} estimates")
        found.append(dict(zip(names, weights.tolist(), strict=True)))
    return NonStationary(walked, tuple(found))
