"""The steps of a flat plan: each op of a program in torch's calls and kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.kernels import Ops
from fastdiff.kernels.native import ADD, ATTENTION, CONV, KINDS, LAYER_NORM, NORM, RESAMPLE, Op

if TYPE_CHECKING:
    from fastdiff.backends.flat.plan import FlatPlan


class Run:
    """One run of a plan: its values by slot; features are ``[B, H, W, C]``."""

    def __init__(self, plan: FlatPlan, ops: Ops):
        self.plan, self.ops = plan, ops
        self.buffers: list[Tensor | None] = [None] * plan.program.slots

    def read(self, slot: int, channels: int) -> Tensor:
        """``channels`` of a value, where a slot points."""
        base, offset = self.plan.program.resolved(slot)
        value = self.buffers[base]
        assert value is not None, f"slot {slot} is read before it is written"
        return value if value.shape[-1] == channels else value[..., offset : offset + channels]

    def give(self, slot: int, value: Tensor) -> None:
        """Keep a value: as it is, or copied to its part of a joined buffer."""
        place = self.place(slot, value)
        if place is None:
            self.buffers[slot] = value
        else:
            place.copy_(value)

    def place(self, slot: int, like: Tensor) -> Tensor | None:
        """Where a value has to be written, if anywhere in particular: ``[B, H, W, N]``."""
        base, offset = self.plan.program.resolved(slot)
        if base not in self.plan.joined:
            return None
        buffer = self.buffers[base]
        if buffer is None:
            size = self.plan.joined[base]
            buffer = self.buffers[base] = like.new_empty(len(like), size.height, size.width, size.channels)
        return buffer[..., offset : offset + like.shape[-1]]

    def normed(self, op: Op) -> Tensor:
        """An op's source ``[B, H, W, C]``: as it lies there, or normalised and activated."""
        x = self.read(op.src0, op.C0)
        if not op.affine:
            return x
        norm, scale, shift = self.plan.norms[op.stats], None, None
        if norm.row >= 0:
            scale, shift = self.read(norm.row, 2 * op.C0).chunk(2, dim=1)
        weight, bias = self.plan.vectors[norm.weight], self.plan.vectors[norm.bias]
        image = x.permute(0, 3, 1, 2)
        row = self.read(self.plan.rows[op.src0], op.C0) if op.src0 in self.plan.rows else None
        y = self.ops.group_norm_silu(
            image, weight, bias, norm.groups, norm.eps, scale=scale, shift=shift, silu=bool(op.silu), row=row
        )
        return y.permute(0, 2, 3, 1)


Step = Callable[[Run, Op], None]


def _conv(run: Run, op: Op) -> None:
    x, weight = run.normed(op), run.plan.weights[op.weight]
    bias = None if op.bias < 0 else run.plan.vectors[op.bias]
    # a convolution's bias would be a pass of its own: the norm or the sum behind it takes it; a product has it free
    own = None if op.out in run.plan.rows or (op.residual >= 0 and op.kernel > 1) else bias
    if op.kernel == 1:
        y = run.ops.linear(x, weight, own)
        if op.gated:
            y = run.ops.geglu(y)
    else:
        y = _slid(op, x.permute(0, 3, 1, 2), weight, own, run.ops).permute(0, 2, 3, 1)
    if op.residual < 0:
        run.give(op.out, y)
    else:
        _added(run, op, (y, bias if op.kernel > 1 else None, run.read(op.residual, op.N)))


def _added(run: Run, op: Op, terms: tuple[Tensor, Tensor | None, Tensor]) -> None:
    """Write ``ops.add`` of some terms where the op's result belongs."""
    place = run.place(op.out, terms[0])
    result = run.ops.add(*terms, place)
    if place is None:
        run.buffers[op.out] = result


def _slid(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, ops: Ops) -> Tensor:
    """A convolution of ``[B, C, H, W]`` with a kernel larger than 1."""
    if (op.SH, op.SW) != (op.VIEW_H, op.VIEW_W):
        return ops.upsample_conv(x, weight, bias, (op.VIEW_H, op.VIEW_W))
    if op.stride == 2 and op.pad == 0:
        x = F.pad(x, (0, 1, 0, 1))
    return F.conv2d(x, weight, bias, stride=op.stride, padding=op.pad)


def _layer_norm(run: Run, op: Op) -> None:
    x = run.read(op.src0, op.C0)
    run.give(op.out, run.ops.layer_norm(x, run.plan.vectors[op.weight], run.plan.vectors[op.bias], op.eps))


def _attention(run: Run, op: Op) -> None:
    q = _heads(run.read(op.src0, op.N), op)
    k, v = (
        _heads(run.read(slot, op.N), op) if slot in run.plan.program.alias else run.buffers[slot]
        for slot in (op.src1, op.weight)
    )
    assert k is not None and v is not None
    if run.plan.upcast and torch.finfo(q.dtype).bits < 32:
        mixed = run.ops.attention(q.float(), k.float(), v.float()).to(q.dtype)
    else:
        mixed = run.ops.attention(q, k, v)
    run.give(op.out, mixed.transpose(1, 2).reshape(op.B, op.H, op.W, op.N))


def _heads(x: Tensor, op: Op) -> Tensor:
    """``[B, H, W, heads * d]`` -> ``[B, heads, H * W, d]``, a view."""
    return x.flatten(1, 2).unflatten(2, (op.heads, -1)).transpose(1, 2)


def _resample(run: Run, op: Op) -> None:
    y = run.normed(op).permute(0, 3, 1, 2)
    if (op.H, op.W) == (op.SH, op.SW):
        result = y
    elif (2 * op.H, 2 * op.W) == (op.SH // 2 * 2, op.SW // 2 * 2):
        result = F.avg_pool2d(y, 2)
    elif (op.H, op.W) == (2 * op.SH, 2 * op.SW):
        result = F.interpolate(y, scale_factor=2.0, mode="nearest")
    else:
        raise PlanError(f"an image of {op.SH}x{op.SW} would become {op.H}x{op.W}; a plan halves or doubles")
    run.give(op.out, result.permute(0, 2, 3, 1))


def _add(run: Run, op: Op) -> None:
    x, more = run.read(op.src0, op.C0), run.read(op.residual, op.C0)
    _added(run, op, (x, None, more))


STEPS: dict[int, Step] = {CONV: _conv, LAYER_NORM: _layer_norm, ATTENTION: _attention, RESAMPLE: _resample, ADD: _add}
assert {*STEPS, NORM} == set(range(len(KINDS))), "an op of the program has no step"
