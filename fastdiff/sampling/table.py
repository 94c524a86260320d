"""The step table: everything a sampler does, as one small tensor of numbers made once on the host in float64.

A row belongs to one network evaluation of one image. Its leading columns turn the network's output into a denoised
estimate; then follow the weights of three weighted sums over the registers (``solvers/base.py`` names them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.kernels import Sums
from fastdiff.sampling.clipping import Clip, DynamicThreshold, bounds
from fastdiff.sampling.guidance import PLAIN, UNGUIDED, Guided, Rule, any_of, flags
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import X0, Prediction
from fastdiff.sampling.solvers.base import Row, Solver, Weights
from fastdiff.sampling.steering import Interval, Steering, Strength, silent_rows

# Columns before the weights: coefficients, the guidance's numbers, clipping, flags
C_IN, C_SKIP, C_OUT, C_NOISE, C_NOISE_TO = range(5)
GUIDANCE, WEAK_NOISE, RESCALE, OPTIMAL, PROJECTED, MOMENTUM, NORM, PARALLEL = range(5, 13)
CLIP, TAIL, PUSH, DRAW1, DRAW2, LEARNED, FIRST_WEIGHT = range(13, 20)
# Registers; history follows the last of these, newest first
REGISTERS = ("x", "anchor", "denoised", "raw", "n1", "n2")
X, ANCHOR, DENOISED, RAW, N1, N2, FIRST_HISTORY = range(7)
OUTPUTS = 3  # x, anchor, history


class Deep(NamedTuple):
    """What a row does with the deep features of the network: see ``sampling/step_cache.py``."""

    branch: int  # the skip connection that they join
    reads: bool  # the layers below it are left out, and what an earlier row kept is read; else this row keeps its own


class RowPlan(NamedTuple):
    """What the host knows about one row: which registers it reads, never their weights. Hashable."""

    x: tuple[int, ...]
    anchor: tuple[int, ...] | None  # None: the anchor is the new x
    history: tuple[int, ...]
    push: bool | None  # None: some images of the batch push and others do not
    draws: tuple[bool, bool]
    guided: Guided | None  # None: the strong estimate alone is asked for
    clipped: bool
    tail: float | None  # largest share of pixels above a dynamic threshold; None: plain clips only
    ends: bool
    asks: bool = True  # False: the network's output counts for nothing, so it is not asked
    learned: bool = False  # does the network say how much noise n1 adds?
    deep: Deep | None = None  # None: the whole network runs, and nothing of it is kept

    @property
    def outputs(self) -> slice:
        """Which of x, anchor, history are computed: a slice leaves out the others without a copy."""
        return slice(0, OUTPUTS - 1 if self.push is False else OUTPUTS, 2 if self.anchor is None else 1)

    @property
    def active(self) -> tuple[tuple[int, ...], ...]:
        """The registers that each computed output reads."""
        lists = [self.x, self.x if self.anchor is None else self.anchor, self.history]
        return tuple(lists[self.outputs])


class Rows(NamedTuple):
    """Table rows taken apart: what the loop and the denoiser read of them. One for each image, or one for all."""

    values: Tensor  # [B or 1, K]
    row_index: Tensor  # [B] int64, where each image stands in its table
    c_in: Tensor  # [B or 1, 1, 1, 1]
    c_skip: Tensor
    c_out: Tensor
    sums: Sums  # over the registers, for the outputs that the plan computes

    def spread(self, batch: int) -> Rows:
        """One row for all images of a batch. All else broadcasts by itself; networks want an index each."""
        return self._replace(row_index=self.row_index.expand(batch))


def take_apart(values: Tensor, row_index: Tensor, plan: RowPlan, mixed: bool = True) -> Rows:
    """View ``values [B, K]`` of images that stand at the rows ``row_index [B]`` of their tables as what is read.

    ``mixed``: the images may come from different tables.
    """
    c_in, c_skip, c_out = values[:, : C_OUT + 1, None, None, None].unbind(1)
    weights = values[:, FIRST_WEIGHT:].view(values.shape[0], OUTPUTS, -1)[:, plan.outputs]
    return Rows(values, row_index, c_in, c_skip, c_out, Sums.of(weights, plan.active, mixed))


class Structure(NamedTuple):
    """The shape of a whole table. Equal structures share one captured loop."""

    history: int
    rows: tuple[RowPlan, ...]
    draws: int  # how many draws of noise the rows make, after the initial one
    momentum: bool = False  # does a row need the register of APG?


@dataclass(frozen=True)
class StepTable:
    """A sampler, ready for the loop.

    Args:
        values: ``[R, K]`` float32, on the device; ``[B, R, K]`` where images are guided by strengths of their own.
        index: ``[R]`` int64, 0..R-1 on the device, so that the loop never uploads.
        structure: what the host knows.
    """

    values: Tensor
    index: Tensor
    structure: Structure
    views: tuple[Rows, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Take every row apart now: views follow their table, and making them costs the loop more than using them."""
        by_row = self.values[:, None] if self.values.dim() == 2 else self.values.transpose(0, 1)
        index = self.index[:, None].expand(-1, by_row.shape[1])
        rows = zip(by_row, index, self.structure.rows, strict=True)
        object.__setattr__(self, "views", tuple(take_apart(*row, mixed=False) for row in rows))

    @property
    def times(self) -> Tensor:
        """What the network is told, ``[R, 2]``: ``(c_noise, c_noise_to)``, the same for all images."""
        values = self.values if self.values.dim() == 2 else self.values[0]
        return values[:, C_NOISE : C_NOISE_TO + 1]

    def walk(self, batch: int) -> Iterator[tuple[RowPlan, Rows]]:
        """Each row's plan, and its numbers for a batch that stands there together."""
        for plan, rows in zip(self.structure.rows, self.views, strict=True):
            yield plan, rows if rows.row_index.shape[0] == batch else rows.spread(batch)


def merge(plans: Sequence[RowPlan]) -> RowPlan:
    """Return the plan of a batch whose images stand at rows of different plans.

    Raises:
        PlanError: if one keeps or reads deep features and another does not.
    """

    def union(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(sorted({index for part in parts for index in part}))

    if all(plan == plans[0] for plan in plans):
        return plans[0]
    cuts = {plan.deep for plan in plans}
    if len(cuts) > 1:
        raise PlanError(f"images at rows of different step caching cannot share an evaluation: {cuts}")
    follows = all(plan.anchor is None for plan in plans)
    pushes = {plan.push for plan in plans}
    return RowPlan(
        x=union([plan.x for plan in plans]),
        # the table holds the anchor's weights in either case, so a follower can be computed like the others
        anchor=None if follows else union([plan.x if plan.anchor is None else plan.anchor for plan in plans]),
        history=union([plan.history for plan in plans]),
        push=pushes.pop() if len(pushes) == 1 else None,
        draws=(any(plan.draws[0] for plan in plans), any(plan.draws[1] for plan in plans)),
        guided=any_of([plan.guided for plan in plans if plan.guided is not None]),
        clipped=any(plan.clipped for plan in plans),
        tail=max((plan.tail for plan in plans if plan.tail is not None), default=None),
        ends=any(plan.ends for plan in plans),
        asks=any(plan.asks for plan in plans),
        learned=any(plan.learned for plan in plans),
        deep=cuts.pop(),
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
    guidance: Strength | Sequence[Strength] = 1.0,
    rule: Rule = PLAIN,
    rescale: float = 0.0,
    interval: Interval | None = None,
    clip: Clip | None = None,
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
        guidance: strength, a number or a function of time, or one of these for each image; 1 means none.
        rule: how a guided row mixes its estimates.
        rescale: share of CFG's mixture that is brought back to the conditional output's contrast, 0 to 1.
        interval: noise levels ``sigma / alpha`` at which to guide, above the first and up to the second; None: all.
        clip: bound of the denoised estimate, a dynamic threshold, or None.
        history: registers to provide, at least what the solver needs (a batch of mixed samplers shares one number).
        device: where the loop will run.
        dtype: of the table; float64 is for measuring a solver, not for speed.

    Raises:
        PlanError: if the parts do not fit one another. Nothing is clamped in silence.
    """
    if solver.jumps and not (prediction.jumps or isinstance(prediction, X0)):
        raise PlanError(
            f"{type(solver).__name__} needs a network that jumps (mean_velocity, direct_map, consistency, lcm, scm, "
            f"or one that jumps to x0); this one predicts {type(prediction).__name__}: use 'ddim' or 'dpmpp_2m'"
        )
    size = solver.history if history is None else history
    if size < solver.history:
        raise PlanError(f"history is {size}; {type(solver).__name__} needs {solver.history}")
    rows = solver.rows(path, times)
    silent = silent_rows(path, prediction, rows, rule)
    steering = Steering.checked(guidance, rule, rescale, interval)
    guided = steering.over(path, solver, rows, silent)
    base = torch.tensor(
        [_values(path, prediction, row, mute, clip, size) for row, mute in zip(rows, silent, strict=True)],
        dtype=torch.float64,
    )
    if not bool(torch.isfinite(base.float()[:, FIRST_WEIGHT:]).all()):
        raise PlanError(f"{type(solver).__name__} has no finite weights on times {list(times)[:4]}...")
    values = base.repeat(len(guided), 1, 1)
    guidances = [[numbers or UNGUIDED for numbers in image] for image in guided]
    values[..., GUIDANCE:CLIP] = torch.tensor(guidances, dtype=torch.float64)
    plans = [
        _plan(row, any_of([flags(numbers) for numbers in images if numbers]), mute, clip, size)
        for row, images, mute in zip(rows, zip(*guided, strict=True), silent, strict=True)
    ]
    index = torch.arange(len(rows), device=device)
    draws = 1 + max((draw for row in rows for draw in row.draws if draw is not None), default=-1)
    momentum = any(plan.guided is not None and plan.guided.momentum for plan in plans)
    if not isinstance(guidance, Sequence):
        values = values[0]
    return StepTable(values.to(device, dtype), index, Structure(size, tuple(plans), draws, momentum))


def _values(path: Path, prediction: Prediction, row: Row, mute: bool, clip: Clip | None, history: int) -> list[float]:
    def dense(weights: Weights) -> list[float]:
        line = [0.0] * (FIRST_HISTORY + history)
        for name, weight in weights.items():
            line[register(name, history)] = weight
        return line

    coefficients = prediction.coefficients(path, row.t, row.s)
    if mute:
        coefficients = coefficients._replace(c_out=0.0)
    to_anchor = row.to_x if row.to_anchor is None else row.to_anchor
    pushes, draws = 0.0 if row.to_history is None else 1.0, [float(draw or 0) for draw in row.draws]
    line = [*coefficients, *UNGUIDED, *bounds(clip), pushes, *draws, row.learned]
    return [*line, *dense(row.to_x), *dense(to_anchor), *dense(row.to_history or {})]


def _plan(row: Row, guided: Guided | None, mute: bool, clip: Clip | None, history: int) -> RowPlan:
    def used(weights: Weights) -> tuple[int, ...]:
        return tuple(sorted(register(name, history) for name, weight in weights.items() if weight != 0))

    return RowPlan(
        x=used(row.to_x),
        anchor=None if row.to_anchor is None else used(row.to_anchor),
        history=used(row.to_history or {}),
        push=row.to_history is not None,
        draws=(row.draws[0] is not None, row.draws[1] is not None),
        guided=guided,
        clipped=clip is not None,
        tail=bounds(clip)[1] if isinstance(clip, DynamicThreshold) else None,
        ends=row.ends,
        asks=not mute,
        learned=row.learned != 0,
    )
