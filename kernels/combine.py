# Fused table-row update: every output of one network evaluation in one pass over the registers.
#
# Shapes   registers, outputs [B, C, H, W] float32, one memory layout for all; weights [B or 1, outputs, R]
#          float32, any strides.
# Grid     (B * ceil(C*H*W / BLOCK)): a program holds one BLOCK of one image, so its weights are scalars.
# Passes   one: each register that any output lists is read once, each output written once.
# Bytes    4 * B*C*H*W * (registers listed + outputs); time >= bytes / bandwidth. A register whose weights are
#          all 0 at an image is not read there.
# Limits   `active` specialises the kernel: one compilation for each distinct tuple of lists. No backward.
# Twin     reference.combine
"""Fused table-row update in Triton. The specification is ``fastdiff.kernels.reference.combine``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import ShapeError

from .sums import Sums
from .tiles import CombineTile, chip_of, lookup


@triton.jit
def _combine_kernel(
    registers, outputs, weights, elements, blocks, stride_b, stride_o, stride_r,
    COLUMNS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # COLUMNS[i]: the column of `weights` that belongs to registers[i]. ACTIVE[o]: indices into `registers`.
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    base = image * elements
    weights += image * stride_b

    values = ()
    for i in tl.static_range(len(COLUMNS)):
        wanted = False
        for o in tl.static_range(len(ACTIVE)):
            for j in tl.static_range(len(ACTIVE[o])):
                if ACTIVE[o][j] == i:
                    wanted = wanted | (tl.load(weights + o * stride_o + COLUMNS[i] * stride_r) != 0)
        values = values + (tl.load(registers[i] + base + offsets, mask=inside & wanted, other=0.0),)

    for o in tl.static_range(len(ACTIVE)):
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(len(ACTIVE[o])):
            weight = tl.load(weights + o * stride_o + COLUMNS[ACTIVE[o][j]] * stride_r)
            # 0 * NaN is NaN, and another output may have had this register read: so select, do not multiply.
            total += tl.where(weight == 0, 0.0, weight * values[ACTIVE[o][j]])
        tl.store(outputs[o] + base + offsets, total, mask=inside)


INTERPRETED = not isinstance(_combine_kernel, triton.JITFunction)


def _check(registers: Sequence[Tensor | None], sums: Sums) -> list[Tensor]:
    weights, active = sums.weights, sums.active
    present = [r for r in registers if r is not None]
    if not present:
        raise ShapeError("combine: every register is None; allowed: at least one [B, C, H, W] tensor")
    like = present[0]
    if like.dim() != 4:
        raise ShapeError(f"combine: register {tuple(like.shape)}; allowed: [B, C, H, W]")
    for register in present:
        if register.shape != like.shape or register.dtype != torch.float32:
            received = f"{tuple(register.shape)} {register.dtype}"
            raise ShapeError(f"combine: register {received}; allowed: {tuple(like.shape)} torch.float32")
    expected = (like.shape[0], len(active), len(registers))
    if tuple(weights.shape) not in (expected, (1, *expected[1:])) or weights.dtype != torch.float32:
        received = f"{tuple(weights.shape)} {weights.dtype}"
        raise ShapeError(f"combine: weights {received}; allowed: {expected} torch.float32, or one row for all")
    for index in {index for used in active for index in used}:
        if not 0 <= index < len(registers) or registers[index] is None:
            allowed = [i for i, register in enumerate(registers) if register is not None]
            raise ShapeError(f"combine: active lists register {index}; allowed: {allowed}")
    return present


def combine(registers: Sequence[Tensor | None], sums: Sums) -> tuple[Tensor, ...]:
    """Weighted sums of registers, one set of weights for each image or one for all.

    The outputs take the layout (contiguous or channels-last) of the first register that is not None; a
    register in another layout is copied first, which costs one more pass over it.

    Args:
        registers: each ``[B, C, H, W]`` float32, or None where no output lists it.
        sums: weights and lists of what is read.

    Returns:
        One ``[B, C, H, W]`` float32 for each output; an output that lists no register is zero.

    Raises:
        ShapeError: if a shape, dtype or index does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.
    """
    present = _check(registers, sums)
    weights, active = sums.weights, sums.active
    chip = chip_of("combine", (*present, weights), interpreted=INTERPRETED)
    tile = cast(CombineTile, lookup("combine", "any", torch.float32, chip.architecture))

    like = present[0]
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    columns = tuple(sorted({index for used in active for index in used}))
    inputs = tuple(cast(Tensor, registers[index]).contiguous(memory_format=layout) for index in columns)
    outputs = tuple(torch.empty(like.shape, device=like.device, memory_format=layout) for _ in active)
    if like.numel() == 0 or not columns:
        return tuple(output.zero_() for output in outputs)

    elements = like[0].numel()
    blocks = triton.cdiv(elements, tile.elements)
    places = tuple(tuple(columns.index(index) for index in used) for used in active)
    by_image = weights.stride(0) if weights.shape[0] == like.shape[0] else 0
    with torch.cuda.device_of(like):
        _combine_kernel[(like.shape[0] * blocks,)](
            inputs, outputs, weights, elements, blocks, by_image, *weights.stride()[1:],
            COLUMNS=columns, ACTIVE=places, BLOCK=tile.elements, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return outputs
