"""Seeded noise. A draw is a pure function of (seed, draw number, element): no state, no order, no company.

The same seed gives the same picture whatever batch it travels in, on every device, after a pause, and in a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.errors import ShapeError

INITIAL = 0  # number of the draw the sampler starts from; the rows' own draws follow
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


class Noise(Protocol):
    """Where the loop gets its noise."""

    def draw(self, number: Tensor, like: Tensor) -> Tensor:
        """Return standard normal noise ``[B, C, H, W]`` float32.

        Args:
            number: ``[B]`` int64, which draw each image wants; 0 is the initial one.
            like: gives shape and device.
        """


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10.

    Args:
        counter: ``[4, ...]`` int64 holding unsigned 32-bit words.
        key: ``[2, ...]`` likewise, broadcastable to one word of the counter.

    Returns:
        ``[4, ...]`` int64, four random 32-bit words each.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", sec. 4.3.
    """
    c0, c1, c2, c3 = counter.unbind()
    k0, k1 = key.unbind()
    for _ in range(10):
        # the signed product wraps, but its bits are those of the unsigned one; the mask drops the sign extension
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _LOW) ^ c1 ^ k0, second & _LOW
        c2, c3 = ((first >> 32) & _LOW) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3])


class PhiloxNoise:
    """Counter-based noise, one seed for each image.

    Args:
        seeds: ``[B]`` int64 on the device of the loop.
    """

    def __init__(self, seeds: Tensor):
        self.seeds = seeds

    def draw(self, number: Tensor, like: Tensor) -> Tensor:
        """See ``Noise.draw``. Four words make four normals by Box and Muller, in float64 so that devices agree."""
        elements = math.prod(like.shape[1:])
        blocks = torch.arange((elements + 3) // 4, device=like.device)
        seeds, zero = self.seeds[: like.shape[0], None], torch.zeros_like(blocks)[None, :]
        blocks, number = blocks[None, :] + 0 * seeds, number[:, None] + zero
        words = philox(
            torch.stack([blocks, number, 0 * number, 0 * number]),
            torch.stack([seeds & _LOW, seeds >> 32 & _LOW]),
        )
        uniform = (words.double() + 0.5) * 2.0**-32  # inside (0, 1): the logarithm below is finite
        radius = torch.sqrt(-2.0 * torch.log(uniform[0::2]))
        angle = 2.0 * math.pi * uniform[1::2]
        normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)  # [2, B, blocks, 2]
        flat = normal.permute(1, 2, 0, 3).reshape(like.shape[0], -1)[:, :elements]
        return flat.view(like.shape).float()


class GeneratorNoise:
    """Noise from ``torch.Generator`` objects, in the order diffusers draws it: for parity, not for serving.

    Args:
        generators: one for the whole batch, or one for each image.
        shape: ``(B, C, H, W)``.
        draws: how many draws a table makes after the initial one.
        device: where the noise is wanted; it is drawn on the generator's device.
        initial: whether the starting noise comes from the generators too.
    """

    def __init__(
        self,
        generators: torch.Generator | Sequence[torch.Generator],
        shape: tuple[int, ...],
        draws: int,
        device: torch.device | str = "cpu",
        initial: bool = True,
    ):
        several = list(generators) if isinstance(generators, Sequence) else None
        if several is not None and len(several) != shape[0]:
            raise ShapeError(
                f"{len(several)} generators for a batch of {shape[0]}; allowed: one, or one for each image"
            )
        taken = []
        for _ in range(draws + initial):
            if several is None:
                assert isinstance(generators, torch.Generator)
                taken.append(torch.randn(shape, generator=generators, device=generators.device))
            else:
                parts = [torch.randn((1, *shape[1:]), generator=g, device=g.device) for g in several]
                taken.append(torch.cat(parts))
        if not initial:
            taken.insert(0, torch.zeros(shape))
        self.values = torch.stack([value.to(device) for value in taken])
        self.places = torch.arange(shape[0], device=device)

    def draw(self, number: Tensor, like: Tensor) -> Tensor:
        """See ``Noise.draw``."""
        return self.values[number, self.places]
