"""Which algorithm each convolution and linear layer runs with, from measured times.

The choice depends on the layer and on the size of the image, never on the batch: an image's bits do not depend on what
it shares a batch with. Prepared weights do not change bits, only memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastdiff.kernels.native import CONV, Op


class Choice(NamedTuple):
    """How one op runs: 0 is the direct product, 2 and 4 are Winograd's F(2x2, 3x3) and F(4x4, 3x3)."""

    algorithm: int = 0
    packed: bool = False

    @property
    def name(self) -> str:
        """As it stands in the table of times."""
        return ("direct", "", "winograd2", "", "winograd4")[self.algorithm] + (" packed" if self.packed else "")


EVERY = tuple(Choice(algorithm, packed) for algorithm in (0, 2, 4) for packed in (False, True))


class Layer(NamedTuple):
    """One op to choose for: what it looks like, and the bytes of prepared weights that each choice would hold."""

    signature: str
    bytes: Mapping[Choice, int]


def signature(op: Op) -> str:
    """What a time is filed under: everything that the work depends on but the batch."""
    parts = f"{op.H}x{op.W} of {op.SH}x{op.SW} {op.C0}+{op.C1}>{op.N} k{op.kernel}s{op.stride}p{op.pad}"
    told = [name for name in ("silu", "gated", "affine") if getattr(op, name)]
    return " ".join([parts, *told, *(["add"] if op.residual >= 0 else [])])


def candidates(op: Op, width: int) -> list[Choice]:
    """What an op may run with, for registers of ``width`` floats."""
    if op.kind != CONV:
        return []
    winograd = (op.kernel, op.stride, op.pad) == (3, 1, 1) and op.C0 % width == 0 and op.C1 % width == 0
    return [choice for choice in EVERY if choice.algorithm == 0 or winograd]


def by_rule(layer: Layer, height: int, width: int) -> Choice:
    """A guess without measurement, for a result of this size."""
    return Choice(4 if Choice(4) in layer.bytes and min(height, width) >= 8 else 0)


def choose(layers: Sequence[Layer], times: Mapping[str, Mapping[str, float]], budget: int) -> list[Choice]:
    """The fastest choice for each layer whose prepared weights fit into ``budget`` bytes together.

    First every layer takes the fastest choice that needs no memory; then memory goes where it saves most time per
    byte. A layer without times runs directly.
    """
    chosen: list[Choice] = []
    offers: list[tuple[float, float, int, Choice]] = []  # seconds saved per byte, seconds saved, layer, choice
    for index, layer in enumerate(layers):
        known = {choice: times.get(layer.signature, {}).get(choice.name) for choice in layer.bytes}
        found = {choice: seconds for choice, seconds in known.items() if seconds is not None}
        free = {choice: seconds for choice, seconds in found.items() if not choice.packed}
        best = min(free, key=free.__getitem__, default=Choice())
        chosen.append(best)
        for choice, seconds in found.items():
            saved = free[best] - seconds if free else 0.0
            if choice.packed and saved > 0:
                offers.append((saved / max(layer.bytes[choice], 1), saved, index, choice))
    taken: dict[int, tuple[float, int]] = {}  # seconds saved and bytes held so far
    for _, saved, index, choice in sorted(offers, key=lambda offer: (-offer[0], offer[2], offer[3])):
        before, held = taken.get(index, (0.0, 0))
        size = layers[index].bytes[choice]
        if size - held <= budget and saved > before:
            budget -= size - held
            taken[index] = saved, size
            chosen[index] = choice
    return chosen
