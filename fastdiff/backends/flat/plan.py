"""A program as a fixed sequence of torch and kernel calls over channels-last buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.backends.flat.join import Joined, join
from fastdiff.backends.program import Program
from fastdiff.errors import PlanError
from fastdiff.kernels import Ops
from fastdiff.kernels.native import ADD, ATTENTION, CONV, KINDS, LAYER_NORM, NORM, RESAMPLE, Op

Buffers = list[Tensor | None]  # by slot; features are [B, H, W, C]
Step = Callable[["FlatPlan", Op, Buffers], None]


class FlatPlan:
    """What one batch size and image size runs; everything is decided beforehand, and nothing asks the device.

    Weights of convolutions are read where they are; those of joined projections (queries, keys and values) are copies,
    which ``refresh`` makes again in place, so that a captured graph of ``run`` follows them.

    Args:
        program: of ``fastdiff.backends.lower``. The plan changes it, so it must not be shared.
        ops: the kernels.
        upcast: compute attention in float32 (networks whose logits overflow float16).
    """

    def __init__(self, program: Program, ops: Ops, *, upcast: bool = False):
        self.ops, self.upcast = ops, upcast
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

    def run(self, given: Mapping[str, Tensor]) -> Tensor:
        """Run every step.

        Args:
            given: the program's externals: ``x`` and ``control0``... ``[B, C, H, W]``, ``rows [B, P]``, and ``keys0``,
                ``values0``... ``[B, heads, tokens, d]``.

        Returns:
            ``[B, C', H, W]``, channels-last.
        """
        buffers: Buffers = [None] * self.program.slots
        for name, slot in self.program.external.items():
            if name != "out":
                image = name == "x" or name.startswith("control")
                buffers[slot] = given[name].permute(0, 2, 3, 1) if image else given[name]
        if self.row_biases is not None:
            buffers[self.program.external["rows"]] = given["rows"] + self.row_biases
        for (step, op), dead in zip(self.steps, self.free, strict=True):
            step(self, op, buffers)
            for slot in dead:
                buffers[slot] = None
        out = buffers[self.program.external["out"]]
        assert out is not None
        return out.permute(0, 3, 1, 2)

    # --- values -----------------------------------------------------------------------------------------------------

    def read(self, buffers: Buffers, slot: int, channels: int) -> Tensor:
        """``channels`` of a value, where a slot points."""
        base, offset = self.program.resolved(slot)
        value = buffers[base]
        assert value is not None, f"slot {slot} is read before it is written"
        return value if value.shape[-1] == channels else value[..., offset : offset + channels]

    def write(self, buffers: Buffers, op: Op, value: Tensor) -> None:
        """Keep an op's result: as it is, or in its part of a joined buffer."""
        place = self.place(buffers, op, value)
        if place is None:
            buffers[op.out] = value
        else:
            place.copy_(value)

    def place(self, buffers: Buffers, op: Op, like: Tensor) -> Tensor | None:
        """Where an op has to write, if anywhere in particular: ``[B, H, W, N]``."""
        base, offset = self.program.resolved(op.out)
        if base not in self.joined:
            return None
        buffer = buffers[base]
        if buffer is None:
            size = self.joined[base]
            buffer = buffers[base] = like.new_empty(op.B, size.height, size.width, size.channels)
        return buffer[..., offset : offset + like.shape[-1]]

    def normed(self, buffers: Buffers, op: Op) -> Tensor:
        """An op's source ``[B, H, W, C]``: as it lies there, or normalised and activated."""
        x = self.read(buffers, op.src0, op.C0)
        if not op.affine:
            return x
        norm, scale, shift = self.norms[op.stats], None, None
        if norm.row >= 0:
            scale, shift = self.read(buffers, norm.row, 2 * op.C0).chunk(2, dim=1)
        weight, bias = self.vectors[norm.weight], self.vectors[norm.bias]
        image = x.permute(0, 3, 1, 2)
        row = self.read(buffers, self.rows[op.src0], op.C0) if op.src0 in self.rows else None
        y = self.ops.group_norm_silu(
            image, weight, bias, norm.groups, norm.eps, scale=scale, shift=shift, silu=bool(op.silu), row=row
        )
        return y.permute(0, 2, 3, 1)

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
        out = self.program.external["out"]
        free: list[list[int]] = [[] for _ in self.steps]
        for slot, index in last.items():
            if slot != out:
                free[index].append(slot)
        return free


def _row(parts: Sequence[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).detach()


# --- steps ----------------------------------------------------------------------------------------------------------


def _conv(plan: FlatPlan, op: Op, buffers: Buffers) -> None:
    x, weight = plan.normed(buffers, op), plan.weights[op.weight]
    bias = None if op.bias < 0 else plan.vectors[op.bias]
    # a convolution's bias would be a pass of its own: the norm or the sum behind it takes it; a product has it free
    own = None if op.out in plan.rows or (op.residual >= 0 and op.kernel > 1) else bias
    if op.kernel == 1:
        y = plan.ops.linear(x, weight, own)
        if op.gated:
            y = plan.ops.geglu(y)
    else:
        y = _slid(op, x.permute(0, 3, 1, 2), weight, own, plan.ops).permute(0, 2, 3, 1)
    if op.residual < 0:
        plan.write(buffers, op, y)
    else:
        _added(plan, op, buffers, (y, bias if op.kernel > 1 else None, plan.read(buffers, op.residual, op.N)))


def _added(plan: FlatPlan, op: Op, buffers: Buffers, terms: tuple[Tensor, Tensor | None, Tensor]) -> None:
    """Write ``ops.add`` of some terms where the op's result belongs."""
    place = plan.place(buffers, op, terms[0])
    result = plan.ops.add(*terms, place)
    if place is None:
        buffers[op.out] = result


def _slid(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, ops: Ops) -> Tensor:
    """A convolution of ``[B, C, H, W]`` with a kernel larger than 1."""
    if (op.SH, op.SW) != (op.VIEW_H, op.VIEW_W):
        return ops.upsample_conv(x, weight, bias, (op.VIEW_H, op.VIEW_W))
    if op.stride == 2 and op.pad == 0:
        x = F.pad(x, (0, 1, 0, 1))
    return F.conv2d(x, weight, bias, stride=op.stride, padding=op.pad)


def _layer_norm(plan: FlatPlan, op: Op, buffers: Buffers) -> None:
    x = plan.read(buffers, op.src0, op.C0)
    plan.write(buffers, op, plan.ops.layer_norm(x, plan.vectors[op.weight], plan.vectors[op.bias], op.eps))


def _attention(plan: FlatPlan, op: Op, buffers: Buffers) -> None:
    q = _heads(plan.read(buffers, op.src0, op.N), op)
    k, v = (
        _heads(plan.read(buffers, slot, op.N), op) if slot in plan.program.alias else buffers[slot]
        for slot in (op.src1, op.weight)
    )
    assert k is not None and v is not None
    if plan.upcast and torch.finfo(q.dtype).bits < 32:
        mixed = plan.ops.attention(q.float(), k.float(), v.float()).to(q.dtype)
    else:
        mixed = plan.ops.attention(q, k, v)
    plan.write(buffers, op, mixed.transpose(1, 2).reshape(op.B, op.H, op.W, op.N))


def _heads(x: Tensor, op: Op) -> Tensor:
    """``[B, H, W, heads * d]`` -> ``[B, heads, H * W, d]``, a view."""
    return x.flatten(1, 2).unflatten(2, (op.heads, -1)).transpose(1, 2)


def _resample(plan: FlatPlan, op: Op, buffers: Buffers) -> None:
    y = plan.normed(buffers, op).permute(0, 3, 1, 2)
    if (op.H, op.W) == (op.SH, op.SW):
        result = y
    elif (2 * op.H, 2 * op.W) == (op.SH // 2 * 2, op.SW // 2 * 2):
        result = F.avg_pool2d(y, 2)
    elif (op.H, op.W) == (2 * op.SH, 2 * op.SW):
        result = F.interpolate(y, scale_factor=2.0, mode="nearest")
    else:
        raise PlanError(f"an image of {op.SH}x{op.SW} would become {op.H}x{op.W}; a plan halves or doubles")
    plan.write(buffers, op, result.permute(0, 2, 3, 1))


def _add(plan: FlatPlan, op: Op, buffers: Buffers) -> None:
    x, more = plan.read(buffers, op.src0, op.C0), plan.read(buffers, op.residual, op.C0)
    _added(plan, op, buffers, (x, None, more))


STEPS: dict[int, Step] = {CONV: _conv, LAYER_NORM: _layer_norm, ATTENTION: _attention, RESAMPLE: _resample, ADD: _add}
assert {*STEPS, NORM} == set(range(len(KINDS))), "an op of the program has no step"
