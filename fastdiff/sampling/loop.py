"""The only sampling loop. Control flow comes from Python ints, numbers come from device tensors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels import REFERENCE, Ops
from fastdiff.sampling.denoiser import Denoiser, Prepared
from fastdiff.sampling.noise import Noise
from fastdiff.sampling.table import DRAW1, DRAW2, PUSH, RowPlan, Rows, StepTable, take_apart


class State(NamedTuple):
    """What a sampler carries between network evaluations. Each ``[B, C, H, W]`` float32, but for ``deep``."""

    x: Tensor
    anchor: Tensor
    history: tuple[Tensor, ...]  # newest first
    momentum: Tensor | None = None  # of guidance, where a table declares it
    deep: Tensor | None = None  # features that a row kept for later ones (``sampling/step_cache.py``), [places, ...]

    @staticmethod
    def start(x: Tensor, history: int, momentum: bool = False) -> State:
        """The state before the first row."""
        return State(x, x, (torch.zeros_like(x),) * history, torch.zeros_like(x) if momentum else None)


def advance(
    denoise: Denoiser,
    state: State,
    rows: Tensor,
    row_index: Tensor,
    plan: RowPlan,
    noise: Noise | None,
    prepared: Prepared,
    ops: Ops = REFERENCE,
) -> State:
    """Evaluate the network once and update every image by its own row of weights.

    Args:
        denoise: network and guidance.
        state: registers of the batch.
        rows: ``[B, K]`` float32, one table row for each image; images may belong to different tables.
        row_index: ``[B]`` int64, where each image stands in its table.
        plan: what any image of the batch reads (``table.merge`` for mixed batches).
        noise: needed where the plan draws.
        prepared: made by the network for these places.
        ops: kernels.
    """
    return _advance(denoise, state, take_apart(rows, row_index, plan), plan, noise, prepared, ops)


def _advance(
    denoise: Denoiser, state: State, rows: Rows, plan: RowPlan, noise: Noise | None, prepared: Prepared, ops: Ops
) -> State:
    denoised, raw, momentum, spread, deep = denoise(state.x, rows, plan, prepared, state.momentum, state.deep)
    n1 = n2 = None
    if noise is not None and plan.draws != (False, False):
        n1, n2 = (
            noise.draw((rows.values[:, column].long() + 1).expand(len(state.x)), state.x) if wanted else None
            for column, wanted in zip((DRAW1, DRAW2), plan.draws, strict=True)
        )
        n1 = n1 if n1 is None or spread is None else spread * n1
    results = ops.combine((state.x, state.anchor, denoised, raw, n1, n2, *state.history), rows.sums)
    history = state.history
    if plan.push is not False:
        shifted = (results[-1], *history[:-1])
        if plan.push is None:
            mask = rows.values[:, PUSH].view(-1, 1, 1, 1) != 0
            shifted = tuple(torch.where(mask, new, old) for new, old in zip(shifted, history, strict=True))
        history = shifted
    return State(results[0], results[0] if plan.anchor is None else results[1], history, momentum, deep)


def iterate(
    denoise: Denoiser,
    x: Tensor,
    table: StepTable,
    noise: Noise | None,
    prepared: Prepared,
    ops: Ops = REFERENCE,
    first: int = 0,
    state: State | None = None,
) -> Iterator[State]:
    """Walk one table row by row, the same row for all images; yields the state after each row.

    A walk that was left after ``first`` rows goes on from its ``state``.
    """
    state = state or State.start(x, table.structure.history, table.structure.momentum)
    for plan, rows in islice(table.walk(x.shape[0]), first, None):
        state = _advance(denoise, state, rows, plan, noise, prepared, ops)
        yield state


def sample(
    denoise: Denoiser,
    x: Tensor,
    table: StepTable,
    noise: Noise | None,
    prepared: Prepared,
    ops: Ops = REFERENCE,
) -> Tensor:
    """Walk the whole table and return the sample ``[B, C, H, W]``."""
    for state in iterate(denoise, x, table, noise, prepared, ops):
        x = state.x
    return x
