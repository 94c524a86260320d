"""How many steps a request needs: an error estimate that UniPC makes anyway.

At every step the corrector (UniC) does the predictor's step (UniP) again with the estimate at its end. Their difference
is of the size of the predictor's error there, one order above what is left of it, and costs no evaluation.

Source: Zhao et al. 2023, arXiv:2302.04867, eq. 8 and 9; the difference of two orders as an error estimate is that of
embedded methods, Hairer, Norsett and Wanner 1993, sec. II.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.sampling import loop
from fastdiff.sampling.denoiser import Network
from fastdiff.sampling.inpaint import shorten
from fastdiff.sampling.parts import make_path, make_solver, make_times
from fastdiff.sampling.path import Path
from fastdiff.sampling.path.base import ratio
from fastdiff.sampling.run import ready
from fastdiff.sampling.solvers.multistep import Multistep

PILOT, MOST = 8, 200  # steps of the walk that estimates, and those that may be chosen


def choose_steps(
    network: Network | Callable[..., Tensor], shape: Sequence[int], *, tolerance: float | None, **options: Any
) -> int:
    """The number of steps of ``unipc`` at which its estimated error is within a tolerance.

    A walk of 8 steps from the request's own noise estimates the error. The estimate is of the predictor, so what is
    chosen is on the safe side for the corrected walk.

    Args:
        network: as of ``fastdiff.sample``.
        shape: ``(B, C, H, W)``; the worst image of the batch decides.
        tolerance: error to allow, relative to the sample's own size.
        options: of ``fastdiff.sample``; ``sampler`` is ``unipc`` in one of its forms that estimate the data.

    Raises:
        PlanError: if the sampler estimates no error, or too many steps were needed.
    """
    sampler = options["sampler"]
    solver = make_solver(sampler, {}) if isinstance(sampler, str) else sampler
    if not _estimates(solver):
        raise PlanError(
            f"num_inference_steps is 'auto' with sampler {sampler!r}; allowed: 'unipc', which estimates its own error, "
            "or 'calibrated'"
        )
    wrong = next((name for name in ("timesteps", "sigmas") if options.get(name) is not None), None)
    if wrong:
        raise PlanError(f"num_inference_steps is 'auto' and {wrong} are given; allowed: one of the two")
    if tolerance is None or not tolerance > 0:
        raise PlanError(f"tolerance is {tolerance!r}; num_inference_steps 'auto' needs one, above 0")
    way, end = pilot_errors(network, shape, **options | {"num_inference_steps": PILOT, "sampler": solver})
    if not math.isfinite(way + end):
        raise PlanError(f"a walk of {PILOT} steps ends in NaN or infinity, so no number of steps can be chosen")
    # way / n^2 + end / n = tolerance, for n in units of the pilot's steps
    share = 2 * tolerance / (end + math.sqrt(end * end + 4 * way * tolerance)) if way + end > 0 else math.inf
    steps = max(solver.estimates, math.ceil(PILOT / share))
    if steps > MOST:
        raise PlanError(f"tolerance is {tolerance:g}; {PILOT} steps are wrong by about {way + end:.3g}, so it needs "
                        f"{steps} steps; allowed: up to {MOST}")  # fmt: skip
    return steps


@torch.no_grad()
def pilot_errors(network: Network | Callable[..., Tensor], shape: Sequence[int], **options: Any) -> tuple[float, float]:
    """The estimated errors of a walk, relative to the size of its sample: all along, and of the step to clean data.

    The largest of the batch; the first falls with the square of the number of steps, the second with their number.
    """
    run = ready(network, shape, **options)
    path = make_path(options.get("path", "straight"))
    times = make_times(path, PILOT, options.get("grid"))
    if options.get("image") is not None:
        times = shorten(times, options.get("strength", 1.0))
    shown, gaps, before = run.state.x, [], run.state.x
    last = torch.zeros(())
    for i, state in enumerate(
        loop.iterate(run.denoiser, run.state.x, run.table, run.noise, run.prepared, state=run.state)
    ):
        if i:
            gaps.append((times[i], state.anchor - shown))
        if i and i == len(times) - 2:  # the last step has no corrector: its estimate is carried on in sigma / alpha
            here, there = (ratio(path, t) for t in times[i - 1 : i + 1])
            if path.alpha_sigma(times[-1])[1] == 0 and math.isfinite(here):
                last = _size(state.x - before) * (there / (here - there))
        shown, before = state.x, state.history[0]
    size = _size(shown)
    total = sum((_size(gap) * _carried(path, t, size) for t, gap in gaps), torch.zeros_like(size))
    return float((total / size).max()), float((last / size).max())


def _estimates(solver: object) -> bool:
    """Does a solver of the ODE correct what it predicted, and remember its estimates of the data?"""
    return (
        isinstance(solver, Multistep) and bool(solver.corrector) and solver.eta == 0 and solver.form.predicts == "data"
    )


def _size(x: Tensor) -> Tensor:
    """Root mean square of each image, float64."""
    return x.double().square().mean((1, 2, 3)).sqrt()


def _carried(path: Path, t: float, size: Tensor) -> Tensor:
    """What becomes of a difference at ``t`` until the end, for data of this size: exact for Gaussian data."""
    alpha, sigma = path.alpha_sigma(t)
    return size / (alpha**2 * size**2 + sigma**2).sqrt()
