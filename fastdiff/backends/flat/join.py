"""Sources that lie side by side become one buffer, so that joining them is where they are written, not a copy."""

from __future__ import annotations

from typing import NamedTuple

from fastdiff.backends.program import Program
from fastdiff.errors import PlanError


class Joined(NamedTuple):
    """A buffer ``[B, H, W, C]`` that several ops write parts of."""

    height: int
    width: int
    channels: int


def join(program: Program) -> dict[int, Joined]:
    """Give every pair of sources one buffer; afterwards each op has one source.

    The parts become aliases of the buffer, so whoever writes or reads one works on some of the buffer's channels.

    Returns:
        The buffers, by slot.

    Raises:
        PlanError: if a value would have to lie in two buffers.
    """
    buffers: dict[int, Joined] = {}
    pairs: dict[tuple[int, int], int] = {}
    for op in program.ops:
        if op.src1 < 0 or not op.C1:
            continue
        pair = (op.src0, op.src1)
        if pair not in pairs:
            taken = next((slot for slot in pair if slot in program.alias), None)
            if taken is not None:
                raise PlanError(f"slot {taken} would lie in two buffers; a plan needs each value in one place")
            slot = pairs[pair] = program.slot()
            buffers[slot] = Joined(op.SH, op.SW, op.C0 + op.C1)
            program.alias |= {op.src0: (slot, 0), op.src1: (slot, op.C0)}
        op.src0, op.src1, op.C0, op.C1 = pairs[pair], -1, op.C0 + op.C1, 0
    return buffers
