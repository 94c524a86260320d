"""What `combine` computes for one table row: taken apart once, on the host, so that a step only does arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Sums(NamedTuple):
    """Weighted sums over registers, one set of weights for each image or one for all."""

    weights: Tensor  # [B or 1, outputs, registers] float32
    active: tuple[tuple[int, ...], ...]  # for each output, the registers that any image of the batch uses
    terms: tuple[tuple[tuple[int, Tensor], ...], ...]  # the same: register and its weight [B or 1, 1, 1, 1]
    mixed: bool  # may a listed weight be 0 at some image?

    @classmethod
    def of(cls, weights: Tensor, active: Sequence[Sequence[int]], mixed: bool = True) -> Sums:
        """Take ``weights [B or 1, outputs, registers]`` apart.

        Args:
            weights: any strides; the sums keep views of it, so they follow what is written there.
            active: for each output, the registers that any image of the batch uses.
            mixed: may a listed weight be 0 at some image? Then that register must not reach that image's sum, NaN and
                infinity in it included. Where one row serves all images the list says it all.
        """
        terms = tuple(
            tuple((index, weights[:, output, index].view(-1, 1, 1, 1)) for index in used)
            for output, used in enumerate(active)
        )
        return cls(weights, tuple(tuple(used) for used in active), terms, mixed)
