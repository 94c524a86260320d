"""The step table: everything a sampler does, as one small tensor of numbers made once on the host in float64.

A row belongs to one network evaluation of one image. Its leading columns turn the network's output into a denoised
estimate; then follow the weights of three weighted sums over the registers (``solvers/base.py`` names them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import X0, Prediction
from fastdiff.sampling.solvers.base import Row, Solver, Weights

# Columns before the weights
C_IN, C_SKIP, C_OUT, C_NOISE, C_NOISE_TO, GUIDANCE, CLIP, PUSH, DRAW1, DRAW2, FIRST_WEIGHT = range(11)
# Registers; history follows the last of these, newest first
REGISTERS = ("x", "anchor", "denoised", "raw", "n1", "n2")
X, ANCHOR, DENOISED, RAW, N1, N2, FIRST_HISTORY = range(7)
OUTPUTS = 3  # x, anchor, history

Strength = float | Callable[[float], float]  # guidance, constant or by time


class RowPlan(NamedTuple):
    """What the host knows about one row: which registers it reads, never their weights. Hashable."""

    x: tuple[int, ...]
    anchor: tuple[int, ...] | None  # None: the anchor is the new x
    history: tuple[int, ...]
    push: bool | None  # None: some images of the batch push and others do not
    draws: tuple[bool, bool]
    guided: bool
    clipped: bool
    ends: bool


class Structure(NamedTuple):
    """The shape of a whole table. Equal structures share one captured loop."""

    history: int
    rows: tuple[RowPlan, ...]
    draws: int  # how many draws of noise the rows make, after the initial one


class StepTable(NamedTuple):
    """A sampler, ready for the loop."""

    values: Tensor  # [R, K] float32, on the device
    index: Tensor  # [R] int64, 0..R-1 on the device, so that the loop never uploads
    structure: Structure

    @property
    def times(self) -> Tensor:
        """What the network is told, ``[R, 2]``: ``(c_noise, c_noise_to)``."""
        return self.values[:, C_NOISE : C_NOISE_TO + 1]


def merge(plans: Sequence[RowPlan]) -> RowPlan:
    """Return the plan of a batch whose images stand at rows of different plans."""

    def union(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(sorted({index for part in parts for index in part}))

    if all(plan == plans[0] for plan in plans):
        return plans[0]
    follows = all(plan.anchor is None for plan in plans)
    pushes = {plan.push for plan in plans}
    return RowPlan(
        x=union([plan.x for plan in plans]),
        # the table holds the anchor's weights in either case, so a follower can be computed like the others
        anchor=None if follows else union([plan.x if plan.anchor is None else plan.anchor for plan in plans]),
        history=union([plan.history for plan in plans]),
        push=pushes.pop() if len(pushes) == 1 else None,
        draws=(any(plan.draws[0] for plan in plans), any(plan.draws[1] for plan in plans)),
        guided=any(plan.guided for plan in plans),
        clipped=any(plan.clipped for plan in plans),
        ends=any(plan.ends for plan in plans),
    )


def register(name: str, history: int) -> int:
    """Return the index of a register by name."""
    if name in REGISTERS:
        return REGISTERS.index(name)
    age = int(name[1:]) if name[:1] == "h" and name[1:].isdigit() else 0
    if not 1 <= age <= history:
        raise PlanError(f"unknown register {name!r}; allowed: {', '.join(REGISTERS)}, h1..h{history}")
    return FIRST_HISTORY + age - 1


def build(
    path: Path,
    prediction: Prediction,
    solver: Solver,
    times: Sequence[float],
    *,
    guidance: Strength = 1.0,
    clip: float | None = None,
    history: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StepTable:
    """Build the table of one sampler.

    Args:
        path: the forward process the network was trained on.
        prediction: what the network predicts.
        solver: how to step.
        times: from a grid, falling strictly.
        guidance: strength of classifier-free guidance, a number or a function of time; 1 means none.
        clip: bound of the denoised estimate, or None.
        history: registers to provide, at least what the solver needs (a batch of mixed samplers shares one number).
        device: where the loop will run.
        dtype: of the table; float64 is for measuring a solver, not for speed.

    Raises:
        PlanError: if the parts do not fit one another. Nothing is clamped in silence.
    """
    if solver.jumps and not (prediction.two_time or isinstance(prediction, X0)):
        raise PlanError(
            f"{type(solver).__name__} needs a network that jumps (mean_velocity, direct_map, or a consistency network "
            f"as x0); this one predicts {type(prediction).__name__}: use 'ddim' or 'dpmpp_2m'"
        )
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        raise PlanError(f"clip is {clip!r}; allowed: a finite number above 0, or none")
    size = solver.history if history is None else history
    if size < solver.history:
        raise PlanError(f"history is {size}; {type(solver).__name__} needs {solver.history}")
    rows = solver.rows(path, times)
    values, plans = [], []
    for row in rows:
        strength = guidance(row.t) if callable(guidance) else guidance
        if not math.isfinite(strength):
            raise PlanError(f"guidance_scale is {strength!r} at t={row.t}; allowed: a finite number")
        values.append(_values(path, prediction, row, float(strength), clip, size))
        plans.append(_plan(row, float(strength), clip, size))
    tensor = torch.tensor(values, dtype=torch.float64)
    if not bool(torch.isfinite(tensor.float()[:, FIRST_WEIGHT:]).all()):
        raise PlanError(f"{type(solver).__name__} has no finite weights on times {list(times)[:4]}...")
    index = torch.arange(len(rows), device=device)
    draws = 1 + max((draw for row in rows for draw in row.draws if draw is not None), default=-1)
    return StepTable(tensor.to(device, dtype), index, Structure(size, tuple(plans), draws))


def _values(
    path: Path, prediction: Prediction, row: Row, guidance: float, clip: float | None, history: int
) -> list[float]:
    def dense(weights: Weights) -> list[float]:
        line = [0.0] * (FIRST_HISTORY + history)
        for name, weight in weights.items():
            line[register(name, history)] = weight
        return line

    coefficients = prediction.coefficients(path, row.t, row.s)
    to_anchor = row.to_x if row.to_anchor is None else row.to_anchor
    draws = [float(draw or 0) for draw in row.draws]
    flags = [guidance, clip or math.inf, 0.0 if row.to_history is None else 1.0, *draws]
    return [*coefficients, *flags, *dense(row.to_x), *dense(to_anchor), *dense(row.to_history or {})]


def _plan(row: Row, guidance: float, clip: float | None, history: int) -> RowPlan:
    def used(weights: Weights) -> tuple[int, ...]:
        return tuple(sorted(register(name, history) for name, weight in weights.items() if weight != 0))

    return RowPlan(
        x=used(row.to_x),
        anchor=None if row.to_anchor is None else used(row.to_anchor),
        history=used(row.to_history or {}),
        push=row.to_history is not None,
        draws=(row.draws[0] is not None, row.draws[1] is not None),
        guided=guidance != 1.0,
        clipped=clip is not None,
        ends=row.ends,
    )
