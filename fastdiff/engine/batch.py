"""Images of different requests in one running batch: one network evaluation and one update for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdiff.engine.promise import Promise, evaluate
from fastdiff.engine.ticket import Ticket
from fastdiff.kernels import Ops
from fastdiff.sampling.denoiser import Estimates, Gathering, Place, Prepared, clip, estimate, mix, part
from fastdiff.sampling.loop import State, advance
from fastdiff.sampling.noise import PhiloxNoise
from fastdiff.sampling.table import RowPlan, Rows, StepTable, merge


@dataclass(eq=False)
class Image:
    """One image of a request, and how far it is."""

    ticket: Ticket
    table: StepTable
    prepared: Prepared  # its strong place, and its weak one behind it where any row is guided
    seed: int
    state: State  # of a batch of one
    row: int = 0
    shown: int = field(default=0)  # previews so far

    @property
    def rank(self) -> tuple[int, int]:
        """See ``waiting.Waiter``."""
        return -self.ticket.priority, self.ticket.number

    @property
    def rows(self) -> int:
        """Network evaluations from start to end."""
        return len(self.table.structure.rows)

    @property
    def plan(self) -> RowPlan:
        """Of the row it stands at."""
        return self.table.structure.rows[self.row]

    @property
    def places(self) -> int:
        """How many of the network's it takes at its row."""
        return 2 if self.plan.guided is not None else 1


class Company:
    """The denoiser of a batch of strangers: the strong half for all, the weak half for those whose row is guided."""

    def __init__(self, network: Gathering, images: Sequence[Image], promise: Promise):
        self.network, self.images, self.promise = network, images, promise
        self.guided = [i for i, image in enumerate(images) if image.plan.guided is not None]
        self.denoised: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        plan: RowPlan,
        prepared: None,
        momentum: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> Estimates:
        """See ``Denoiser``; the engine admits no row that keeps deep features."""
        told = [Place(image.prepared, 0, image.row) for image in self.images]
        told += [Place(self.images[i].prepared, 1, self.images[i].row) for i in self.guided]
        scaled, weak = rows.c_in * x, None
        if self.guided:
            scaled = torch.cat([scaled, scaled[self.guided]])
        output = evaluate(self.network, scaled, told, self.promise)
        strong, spread = part(x, output[: len(x)], rows, plan)
        if plan.guided is None:
            raw = guided = estimate(x, strong, rows)
        else:
            weak = strong.clone()
            weak[self.guided] = output[len(x) :, : x.shape[1]]
            guided, raw, momentum = mix(x, strong, weak, rows, plan.guided, momentum)
        self.denoised = clip(guided, rows, plan)
        return Estimates(self.denoised, raw, momentum, spread)


def stack(images: Sequence[Image]) -> State:
    """The states of images as one batch."""
    states = [image.state for image in images]
    momentum = None
    if any(state.momentum is not None for state in states):
        momentum = torch.cat([torch.zeros_like(s.x) if s.momentum is None else s.momentum for s in states])
    history = tuple(torch.cat(parts) for parts in zip(*(state.history for state in states), strict=True))
    return State(torch.cat([s.x for s in states]), torch.cat([s.anchor for s in states]), history, momentum)


def split(state: State, images: Sequence[Image]) -> list[State]:
    """A batch's state as one for each image; momentum only for those that had one."""
    parts = []
    for i, image in enumerate(images):
        one = slice(i, i + 1)
        kept = image.state.momentum is not None and state.momentum is not None
        history = tuple(h[one] for h in state.history)
        parts.append(State(state.x[one], state.anchor[one], history, state.momentum[one] if kept else None))
    return parts


@torch.no_grad()
def step(network: Gathering, images: Sequence[Image], promise: Promise, ops: Ops) -> tuple[list[State], Tensor]:
    """Evaluate the network once for images at any rows of any tables.

    Nothing is changed: a step that fails, for want of memory say, can be tried again with fewer images.

    Returns:
        The state of each after its row, and the denoised estimates ``[B, C, H, W]``.
    """
    device = images[0].state.x.device
    company = Company(network, images, promise)
    values = torch.stack([image.table.values[image.row] for image in images])
    index = torch.zeros(len(images), dtype=torch.int64, device=device)
    plan = merge([image.plan for image in images])
    noise = None
    if plan.draws != (False, False):
        noise = PhiloxNoise(torch.tensor([image.seed for image in images], device=device))
    state = advance(company, stack(images), values, index, plan, noise, None, ops)
    assert company.denoised is not None
    return split(state, images), company.denoised
