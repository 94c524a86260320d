"""Same seed, same bits: checked for a network before an engine relies on it, never assumed.

Libraries pick other algorithms for other batch sizes, and some compute an image differently by its place. What passes
runs in batches; what does not runs one image at a time, which needs no promise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.sampling.denoiser import Gathering, Place

SECONDS = 10.0  # that an examination may take, about
COLD_SECONDS = 120.0  # with what backends do once: compile, or measure, which some keep on disk


class Promise(NamedTuple):
    """In which batches a network may run for images of one shape."""

    widths: tuple[int, ...]  # sizes that gave every image the bits it has alone, the largest last

    def describe(self) -> str:
        """One line for people."""
        if self.widths[-1] == 1:
            return "one image at a time: in company its bits would depend on the batch"
        return f"up to {self.widths[-1]} images in one call, each with the bits it has alone (checked)"

    def cut(self, count: int) -> list[int]:
        """``count`` images as batches of allowed sizes, the largest first."""
        sizes = []
        while count:
            size = max(width for width in self.widths if width <= count)
            sizes.append(size)
            count -= size
        return sizes


@torch.no_grad()
def examine(
    network: Gathering, places: Sequence[Place], shape: Sequence[int], most: int, device: torch.device
) -> Promise:
    """Find the batch sizes up to ``most`` that keep every image's bits, at every place and in any company.

    Large networks are slow to examine: what was not examined within ``SECONDS`` is not used. The first call of a batch
    size, which may compile or measure, counts towards ``COLD_SECONDS`` only.

    Args:
        network: to examine.
        places: different conditionings and rows to draw from, at least one.
        shape: ``(C, H, W)``.
        most: the largest batch.
        device: where.
    """
    draw, begin, spent = torch.Generator().manual_seed(0), time.monotonic(), 0.0
    x = torch.randn(most, *shape, generator=draw).to(device)
    told = [places[i % len(places)] for i in range(most)]
    alone: dict[int, Tensor] = {}

    _call(network, x[:1], told[:1])

    def keeps(batch: Sequence[int]) -> bool:
        for i in batch:
            if i not in alone:
                alone[i] = _call(network, x[i : i + 1], told[i : i + 1])
        got = _call(network, x[list(batch)], [told[i] for i in batch])
        return all(torch.equal(got[k : k + 1], alone[i]) for k, i in enumerate(batch))

    powers = [2**k for k in range(1, most.bit_length()) if 2**k <= most]
    widths = [1]
    for width in dict.fromkeys([*powers, most, *range(2, most)]):
        if spent > SECONDS or time.monotonic() - begin > COLD_SECONDS:
            break
        _call(network, x[:width], told[:width])
        warm = time.monotonic()
        order = torch.randperm(most, generator=draw).tolist()
        if keeps(order[:width]) and keeps(order[-width:][::-1]):
            widths.append(width)
        spent += time.monotonic() - warm
    return Promise(tuple(sorted(widths)))


def _call(network: Gathering, x: Tensor, told: Sequence[Place]) -> Tensor:
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return network(x, index, network.gather(told))


def evaluate(network: Gathering, x: Tensor, told: Sequence[Place], promise: Promise) -> Tensor:
    """The network's output for images of different runs, ``[B, C, H, W]``, in batches that keep their bits."""
    sizes = promise.cut(len(told))
    if len(sizes) == 1:
        return _call(network, x, told)
    parts, start = [], 0
    for size in sizes:
        parts.append(_call(network, x[start : start + size], told[start : start + size]))
        start += size
    return torch.cat(parts)
