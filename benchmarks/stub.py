"""A network that costs nothing: what is measured or tested with it is everything around the network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.pipeline import Pipeline
from fastdiff.sampling.denoiser import Cond, Place

WAIT = 60.0  # seconds, at most, for a gate


class Stub:
    """A network of one multiplication, which can be told to wait, fail or return NaN for a label.

    Args:
        gate: acquired at every call.
        fail: called with the labels ``[B]`` of every call; may raise.
        nan: the label whose images become NaN.
        slow: seconds of every call.
    """

    def __init__(
        self,
        gate: threading.Semaphore | None = None,
        fail: Callable[[Tensor], object] | None = None,
        nan: int | None = None,
        slow: float = 0.0,
    ):
        self.gate, self.fail, self.nan, self.slow = gate, fail, nan, slow
        self.batches: list[int] = []

    def prepare(self, cond: Cond, times: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``Network.prepare``."""
        return times, cond.label

    def gather(self, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
        """See ``Gathering.gather``."""
        times = torch.cat([p.prepared[0][:1, p.row] for p in places])
        return times, torch.stack([p.prepared[1][p.place] for p in places])

    def __call__(self, x: Tensor, row_index: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        self.batches.append(len(x))
        if self.gate is not None:
            self.gate.acquire(timeout=WAIT)
        if self.slow:
            time.sleep(self.slow)
        if self.fail is not None:
            self.fail(prepared[1])
        out = 0.1 * x
        return torch.where((prepared[1] == self.nan).view(-1, 1, 1, 1), torch.nan, out) if self.nan is not None else out


def stub_pipeline() -> tuple[Pipeline, Stub]:
    """The bundled model with a stub in place of its network."""
    pipe, stub = Pipeline.from_pretrained("digits", backend="eager"), Stub()
    assert isinstance(pipe, Pipeline)
    pipe.network = stub
    return pipe, stub
