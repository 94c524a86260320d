"""Images of one shape, which run together, and what an engine asks about an image."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff.engine.batch import Image
from fastdiff.engine.promise import Promise

SMOOTHING = 0.1  # weight of the newest step in the mean time of a step


class Bucket:
    """Images of one shape, which run together.

    Args:
        width: the network's places they may take together; when memory runs out, those of all but the newest image.
        promise: in which batches they keep their bits.
    """

    def __init__(self, width: int, promise: Promise):
        self.width, self.promise = width, promise
        self.running: list[Image] = []
        self.seconds = 0.0  # of a step, about

    def room(self, image: Image) -> bool:
        """Is there a place for an image? A lone one always finds one."""
        return not self.running or self.taken() + most_places(image) <= self.width

    def taken(self) -> int:
        """Places that the running images may need."""
        return sum(most_places(image) for image in self.running)

    def timed(self, seconds: float) -> None:
        """Take note of how long a step took."""
        self.seconds = seconds if not self.seconds else (1 - SMOOTHING) * self.seconds + SMOOTHING * seconds


class Turn(NamedTuple):
    """One step of a bucket, for those who measure."""

    seconds: float
    images: int
    places: int  # of the network that they took
    width: int  # places that there were


class Stats(NamedTuple):
    """Counts since the start, and what is going on now."""

    waiting: int
    running: int
    steps: int  # of the network, whatever the batch
    images: int  # evaluated in them, summed up
    answered: dict[str, int]  # by outcome: "done", or the name of an error


def most_places(image: Image) -> int:
    """The network's places that an image takes where it takes most."""
    return 2 if any(row.guided is not None for row in image.table.structure.rows) else 1


def shape_of(image: Image) -> tuple[int, ...]:
    """Which bucket an image belongs to."""
    return tuple(image.state.x.shape[1:])


def leaves_for_good(image: Image, now: float) -> bool:
    """Is a paused image not to come back?"""
    return image.ticket.cancelled or (image.ticket.deadline is not None and now > image.ticket.deadline)


def short_of_memory(error: Exception) -> bool:
    """Did memory run out? A CPU's allocator says so in a ``RuntimeError``."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
