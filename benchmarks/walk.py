"""The rows of a solver carried out plainly: what the loop computes, in thirty lines, in float64, on anything linear.

The registers may be images or, since everything but the network is linear, coefficients of random variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.sampling.solvers import Row
from fastdiff.sampling.solvers.base import Weights

Denoise = Callable[[Tensor, Row], Tensor]  # (x, row) -> D, shaped like x
Draw = Callable[[int], Tensor]  # number of the draw -> noise, shaped like x


class State(NamedTuple):
    """The registers that last from row to row."""

    x: Tensor
    anchor: Tensor
    history: tuple[Tensor, ...]  # newest first


def start(x: Tensor, history: int) -> State:
    """The state before the first row."""
    return State(x, x, (torch.zeros_like(x),) * history)


def step(state: State, row: Row, denoise: Denoise, draw: Draw | None = None) -> State:
    """Carry out one row; nothing is clipped, so ``raw`` is ``denoised``."""
    estimate = denoise(state.x, row)
    held = {"x": state.x, "anchor": state.anchor, "denoised": estimate, "raw": estimate}
    held |= {f"h{i}": value for i, value in enumerate(state.history, 1)}
    held |= {f"n{i}": draw(number) for i, number in enumerate(row.draws, 1) if number is not None and draw is not None}

    def total(weights: Weights) -> Tensor:
        return sum((weight * held[name] for name, weight in weights.items()), torch.zeros_like(state.x))

    x = total(row.to_x)
    anchor = x if row.to_anchor is None else total(row.to_anchor)
    history = state.history if row.to_history is None else (total(row.to_history), *state.history[:-1])
    return State(x, anchor, history)


def walk(rows: Sequence[Row], x: Tensor, history: int, denoise: Denoise, draw: Draw | None = None) -> Iterator[State]:
    """Carry out all rows; yields the state after each."""
    state = start(x, history)
    for row in rows:
        state = step(state, row, denoise, draw)
        yield state
