"""What the loop costs the host at each step beyond its arithmetic, and what diffusers' ``step`` costs beyond the same.

The network gives back its input. The bare arithmetic is the list of torch calls that the loop's plan needs, on the same
tensors, every view taken beforehand: scale the input, form the estimate, combine the registers.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.sampling.denoiser import Cond, NetworkDenoiser, Prepared
from fastdiff.sampling.grid import trailing
from fastdiff.sampling.loop import sample
from fastdiff.sampling.path import linear_betas
from fastdiff.sampling.prediction import Eps
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.table import StepTable, build

SHAPE = (1, 4, 32, 32)
STEPS = 20
# ours, diffusers' scheduler, its options: the same sampler on the same times
PAIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("ddim", "DDIMScheduler", {"clip_sample": False}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("unipc", "UniPCMultistepScheduler", {"solver_order": 2}),
]


class Cost(NamedTuple):
    """Microseconds a step, beyond the bare arithmetic."""

    sampler: str
    ours: float
    bare: float  # the bare arithmetic itself
    diffusers: float


class Identity:
    """A network that costs nothing: what is left of the loop's time is the loop."""

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``."""

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared) -> Tensor:
        """See ``Network.__call__``."""
        return x


Sum = tuple[tuple[int, Tensor], ...]  # registers and their weights


def bare(table: StepTable, start: Tensor) -> Callable[[], Tensor]:
    """Return the arithmetic of an identity network's loop over a table that draws nothing and is not guided.

    Nothing but torch's own calls on tensors: what to add up, and every view of a weight, is written down beforehand.
    """
    steps: list[tuple[Tensor, Tensor, Tensor, Sum, Sum, Sum]] = []
    for plan, rows in table.walk(start.shape[0]):
        sums = iter(rows.sums.terms)
        to_x, to_anchor, to_history = (
            next(sums) if computed else () for computed in (True, plan.anchor is not None, plan.push)
        )
        steps.append((rows.c_in, rows.c_skip, rows.c_out, to_x, to_anchor, to_history))
    past = [torch.zeros_like(start)] * table.structure.history

    def add_up(terms: Sum, registers: list[Tensor]) -> Tensor:
        (index, weight), *others = terms
        total = weight * registers[index]
        for index, weight in others:
            total = total + weight * registers[index]
        return total

    def run() -> Tensor:
        x = anchor = start
        history = past
        for c_in, c_skip, c_out, to_x, to_anchor, to_history in steps:
            denoised = c_skip * x + c_out * (c_in * x)
            registers = [x, anchor, denoised, denoised, None, None, *history]
            x = add_up(to_x, registers)
            anchor = add_up(to_anchor, registers) if to_anchor else x
            if to_history:
                history = [add_up(to_history, registers), *history[:-1]]
        return x

    return run


def _scheduler(name: str, options: dict[str, Any], start: Tensor) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """What readies diffusers' scheduler for another run, untimed, and the run."""
    import diffusers

    scheduler = getattr(diffusers, name)(timestep_spacing="trailing", **options)

    def run() -> Tensor:
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
        return x

    return lambda: scheduler.set_timesteps(STEPS), run


def _timed(run: Callable[[], Tensor], ready: Callable[[], None] = lambda: None) -> float:
    """Microseconds of the second of two runs, so that each finds the caches as it left them itself."""
    ready()
    run()
    ready()
    begin = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - begin)


@torch.no_grad()
def host_cost(sampler: str, scheduler: str, options: dict[str, Any], rounds: int) -> Cost:
    """Time one sampler in ``rounds`` rounds, in which the three runs take turns.

    Whatever slows the machine for a while slows all three, so each round gives one difference; their median counts.
    """
    path, solver = linear_betas(), SOLVERS[sampler]()
    table = build(path, Eps(), solver, trailing(path, STEPS))
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    denoiser, plain = NetworkDenoiser(Identity()), bare(table, start)

    def loop() -> Tensor:
        return sample(denoiser, start, table, None, None)

    if not torch.equal(loop(), plain()):
        raise AssertionError("the bare arithmetic is not the loop's")
    ready, theirs = _scheduler(scheduler, options, start)
    spent: list[tuple[float, float, float]] = []
    gc.disable()
    try:
        for _ in range(rounds):
            spent.append((_timed(loop), _timed(plain), _timed(theirs, ready)))
    finally:
        gc.enable()
    rows = len(table.structure.rows)
    return Cost(
        sampler,
        statistics.median(whole - alone for whole, alone, _ in spent) / rows,
        statistics.median(alone for _, alone, _ in spent) / rows,
        statistics.median(other - alone for _, alone, other in spent) / rows,
    )
