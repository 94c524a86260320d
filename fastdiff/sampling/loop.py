"""The only sampling loop. Control flow comes from Python ints, numbers come from device tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels import REFERENCE, Ops
from fastdiff.sampling.denoiser import Denoiser, Prepared
from fastdiff.sampling.noise import Noise
from fastdiff.sampling.table import DRAW1, DRAW2, FIRST_WEIGHT, OUTPUTS, PUSH, RowPlan, StepTable


class State(NamedTuple):
    """What a sampler carries between network evaluations. Each ``[B, C, H, W]`` float32."""

    x: Tensor
    anchor: Tensor
    history: tuple[Tensor, ...]  # newest first

    @staticmethod
    def start(x: Tensor, history: int) -> State:
        """The state before the first row."""
        return State(x, x, (torch.zeros_like(x),) * history)


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
    denoised, raw = denoise(state.x, rows, row_index, plan, prepared)
    n1, n2 = (
        noise.draw(rows[:, column].long() + 1, state.x) if wanted and noise is not None else None
        for column, wanted in zip((DRAW1, DRAW2), plan.draws, strict=True)
    )
    registers = (state.x, state.anchor, denoised, raw, n1, n2, *state.history)
    weights = rows[:, FIRST_WEIGHT:].unflatten(1, (OUTPUTS, len(registers)))
    moves, pushes = plan.anchor is not None, plan.push is not False
    wanted = [used for used in (plan.x, plan.anchor, plan.history if pushes else None) if used is not None]
    # outputs are x, anchor, history in that order; a slice leaves out those nobody asked for, without a copy
    chosen = slice(0, OUTPUTS if pushes else OUTPUTS - 1, 1 if moves else 2)
    results = ops.combine(registers, weights[:, chosen], wanted)
    history = state.history
    if pushes:
        shifted = (results[-1], *history[:-1])
        if plan.push is None:
            mask = rows[:, PUSH].view(-1, 1, 1, 1) != 0
            shifted = tuple(torch.where(mask, new, old) for new, old in zip(shifted, history, strict=True))
        history = shifted
    return State(results[0], results[1] if moves else results[0], history)


def iterate(
    denoise: Denoiser,
    x: Tensor,
    table: StepTable,
    noise: Noise | None,
    prepared: Prepared,
    ops: Ops = REFERENCE,
) -> Iterator[State]:
    """Walk one table row by row, the same row for all images; yields the state after each row."""
    state, batch = State.start(x, table.structure.history), x.shape[0]
    for i, plan in enumerate(table.structure.rows):
        rows, row_index = table.values[i].expand(batch, -1), table.index[i].expand(batch)
        state = advance(denoise, state, rows, row_index, plan, noise, prepared, ops)
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
