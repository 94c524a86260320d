# Fused table-row update: every output of one network evaluation in one pass over the registers.
#
# Shapes   registers, outputs [B, C, H, W] in float32, float16 or bfloat16, each its own, one memory layout for
#          all; weights [B or 1, outputs, R] float32, any strides.
# Grid     (B * ceil(C*H*W / BLOCK)): a program holds one BLOCK of one image, so its weights are scalars.
# Passes   one: each register that any output lists is read once, each output written once. Sums in float32.
# Bytes    B*C*H*W * (itemsizes of the registers listed + of the outputs); time >= bytes / bandwidth. A register
#          whose weights are all 0 at an image is not read there.
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

from .edge import DTYPES, chip_of
from .sums import Sums
from .tiles import CombineTile, lookup


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
        values = values + (tl.load(registers[i] + base + offsets, mask=inside & wanted, other=0.0).to(tl.float32),)

    for o in tl.static_range(len(ACTIVE)):
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(len(ACTIVE[o])):
            weight = tl.load(weights + o * stride_o + COLUMNS[ACTIVE[o][j]] * stride_r)
            # 0 * NaN is NaN, and another output may have had this register read: so select, do not multiply.
            total += tl.where(weight == 0, 0.0, weight * values[ACTIVE[o][j]])
        place = outputs[o] + base + offsets
        tl.store(place, total.to(place.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_combine_kernel, triton.JITFunction)


def _check(registers: Sequence[Tensor | None], sums: Sums) -> list[Tensor]:
    weights, active = sums.weights, sums.active
    present = [r for r in registers if r is not None]
    if not present:
        raise ShapeError("combine: every register is None; allowed: at least one [B, C, H, W] tensor")
    like = present[0]
    if like.dim() != 4 or like.numel() == 0:
        raise ShapeError(f"combine: register {tuple(like.shape)}; allowed: [B, C, H, W], not empty")
    for register in present:
        if register.shape != like.shape or register.dtype not in DTYPES:
            received = f"{tuple(register.shape)} {register.dtype}"
            raise ShapeError(f"combine: register {received}; allowed: {tuple(like.shape)} in {_names(DTYPES)}")
    expected = (like.shape[0], len(active), len(registers))
    if tuple(weights.shape) not in (expected, (1, *expected[1:])) or weights.dtype != torch.float32:
        received = f"{tuple(weights.shape)} {weights.dtype}"
        raise ShapeError(f"combine: weights {received}; allowed: {expected} torch.float32, or one row for all")
    for index in {index for used in active for index in used}:
        if not 0 <= index < len(registers) or registers[index] is None:
            allowed = [i for i, register in enumerate(registers) if register is not None]
            raise ShapeError(f"combine: active lists register {index}; allowed: {allowed}")
    return present


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(str, dtypes))


def _outputs(
    like: Tensor,
    count: int,
    layout: torch.memory_format,
    dtypes: Sequence[torch.dtype] | None,
    out: Sequence[Tensor] | None,
) -> tuple[Tensor, ...]:
    """Where to write: what was given, or new tensors."""
    kinds = tuple(dtypes) if dtypes is not None else tuple(t.dtype for t in out or ()) or (torch.float32,) * count
    if len(kinds) != count or not set(kinds) <= set(DTYPES):
        raise ShapeError(f"combine: dtypes {_names(kinds)}; allowed: {count}, each of {_names(DTYPES)}")
    if out is None:
        return tuple(torch.empty(like.shape, device=like.device, dtype=kind, memory_format=layout) for kind in kinds)
    for place, (tensor, kind) in enumerate(zip(out, kinds, strict=True)):
        if tensor.shape != like.shape or tensor.dtype != kind or not tensor.is_contiguous(memory_format=layout):
            received = f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"
            raise ShapeError(f"combine: out {place} {received}; allowed: {tuple(like.shape)} {kind}, {layout}")
    return tuple(out)


def combine(
    registers: Sequence[Tensor | None],
    sums: Sums,
    dtypes: Sequence[torch.dtype] | None = None,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Weighted sums of registers, one set of weights for each image or one for all.

    The outputs take the layout (contiguous or channels-last) of the first register that is not None; a
    register in another layout is copied first, which costs one more pass over it.

    Args:
        registers: each ``[B, C, H, W]``, not empty, in float32, float16 or bfloat16, or None where no output lists it.
        sums: weights and lists of what is read.
        dtypes: of each output; those of ``out``, or float32, where None.
        out: a tensor for each output, laid out as the outputs are; written and returned. An output may take the place
            of a register.

    Returns:
        One ``[B, C, H, W]`` for each output; an output that lists no register is zero.

    Raises:
        ShapeError: if a shape, dtype, layout or index does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.
    """
    present = _check(registers, sums)
    weights, active = sums.weights, sums.active
    chip = chip_of("combine", (*present, weights, *(out or ())), interpreted=INTERPRETED)
    tile = cast(CombineTile, lookup("combine", "any", torch.float32, chip.architecture))

    like = present[0]
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    columns = tuple(sorted({index for used in active for index in used}))
    inputs = tuple(cast(Tensor, registers[index]).contiguous(memory_format=layout) for index in columns)
    outputs = _outputs(like, len(active), layout, dtypes, out)
    if not columns:
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
