"""A program as a fixed sequence of torch and kernel calls over channels-last buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdiff.backends.flat.join import Joined, join
from fastdiff.backends.flat.steps import STEPS, Run
from fastdiff.backends.program import Program
from fastdiff.errors import PlanError
from fastdiff.kernels import Ops
from fastdiff.kernels.native import CONV, NORM


class FlatPlan:
    """What one batch size and image size runs; everything is decided beforehand, and nothing asks the device.

    Weights of convolutions are read where they are; those of joined projections (queries, keys and values) are copies,
    which ``refresh`` makes again in place, so that a captured graph of ``run`` follows them.

    Args:
        program: of ``fastdiff.backends.lower``. The plan changes it, so it must not be shared.
        upcast: compute attention in float32 (networks whose logits overflow float16).
    """

    def __init__(self, program: Program, *, upcast: bool = False):
        self.upcast = upcast
        self.joined: dict[int, Joined] = join(program)
        self.program = program
        self.norms = {op.out: op for op in program.ops if op.kind == NORM}
        self.steps = [(STEPS[op.kind], op) for op in program.ops if op.kind != NORM]
        self.weights = {slot: weight.tensor() for slot, weight in program.weights.items()}
        self.vectors = {slot: _row(parts) for slot, parts in program.vectors.items()}
        self.rows = self._rows()
        self.row_biases = self._row_biases()
        self.free = self._last_uses()

    def _rows(self) -> dict[int, int]:
        """Values that a time row is added to, and the slots of those rows: the norm that reads a value adds its row.

        Raises:
            PlanError: if anything but one norm reads such a value.
        """
        rows = {op.out: op.row for op in self.program.ops if op.kind == CONV and op.row >= 0}
        for slot in rows:
            readers = [op for op in self.program.ops if slot in (op.src0, op.src1, op.residual) and op.kind != NORM]
            if [op.affine for op in readers] != [1] or slot in self.program.alias:
                raise PlanError(f"slot {slot} gets a time row and is not read by a norm alone; a plan adds it there")
        return rows

    def _row_biases(self) -> Tensor | None:
        """``[P]``: what is added to every image's time rows: the biases of the convolutions that get them."""
        found = [(op, self.vectors[op.bias]) for op in self.program.ops if op.out in self.rows and op.bias >= 0]
        if not found:
            return None
        width = max(op.row_stride for op, _ in found)
        biases = found[0][1].new_zeros(width)
        for op, bias in found:
            start = self.program.resolved(op.row)[1]
            biases[start : start + op.N] = bias
        return biases

    def refresh(self) -> None:
        """Make the copies of joined weights again, in place."""
        for slot, weight in self.program.weights.items():
            if len(weight.parts) > 1:
                self.weights[slot].copy_(weight.tensor())
        for slot, parts in self.program.vectors.items():
            if len(parts) > 1:
                self.vectors[slot].copy_(_row(parts))
        if self.row_biases is not None:
            self.row_biases.copy_(self._row_biases())

    def run(self, given: Mapping[str, Tensor], ops: Ops) -> dict[str, Tensor]:
        """Run every step.

        Args:
            ops: the kernels.
            given: the program's externals: ``x`` and ``control0``... ``[B, C, H, W]``, ``rows [B, P]``, and ``keys0``,
                ``values0``... ``[B, heads, tokens, d]``; ``deep [B, C'', H'', W'']``.

        Returns:
            ``out [B, C', H, W]``, channels-last, and the program's results, each likewise.
        """
        run = Run(self, ops)
        for name, slot in self.program.external.items():
            if name == "deep":
                run.give(slot, given[name].permute(0, 2, 3, 1))
            elif name != "out":
                image = name == "x" or name.startswith("control")
                run.buffers[slot] = given[name].permute(0, 2, 3, 1) if image else given[name]
        if self.row_biases is not None:
            run.buffers[self.program.external["rows"]] = given["rows"] + self.row_biases
        for (step, op), dead in zip(self.steps, self.free, strict=True):
            step(run, op)
            for slot in dead:
                run.buffers[slot] = None
        out = run.buffers[self.program.external["out"]]
        assert out is not None
        found = {name: run.read(value.slot, value.channels) for name, value in self.program.results.items()}
        return {name: value.permute(0, 3, 1, 2) for name, value in ({"out": out} | found).items()}

    def _last_uses(self) -> list[list[int]]:
        """For each step the buffers that nobody reads after it."""
        last: dict[int, int] = {}
        for index, (_, op) in enumerate(self.steps):
            slots = [op.src0, op.src1, op.weight, op.residual, op.out]
            if op.affine:
                slots += [self.norms[op.stats].row, self.rows.get(op.src0, -1)]
            for slot in slots:
                if slot >= 0:
                    last[self.program.resolved(slot)[0]] = index
        kept = {self.program.resolved(value.slot)[0] for value in self.program.results.values()}
        kept.add(self.program.external["out"])
        free: list[list[int]] = [[] for _ in self.steps]
        for slot, index in last.items():
            if slot not in kept:
                free[index].append(slot)
        return free


def _row(parts: Sequence[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).detach()
