"""Fused GroupNorm, modulation and SiLU in Triton: how an image is cut, and the launches.

The specification is ``reference.group_norm_silu``; the kernels, with bytes and passes: ``group_norm_kernels.py``.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from fastdiff.errors import ShapeError

from .edge import DTYPES, channels_last, check_like, check_vectors, chip_of, pixel_stride, writable
from .group_norm_kernels import _apply_kernel, _reduce_kernel, _team_kernel, _whole_kernel
from .tiles import Chip, NormTile, TeamTile, lookup

REGISTERS = 65536  # of a multiprocessor, on every chip so far
MOST_SPLITS = 64
MOST_MEMBERS = 256  # of a team: their moments are read at once
INTERPRETED = not isinstance(_whole_kernel, triton.JITFunction)


class Plan(NamedTuple):
    """How one image is cut.

    ``kind`` is ``"whole"`` (a program holds an item), ``"team"`` (``parts`` programs hold it together) or ``"split"``
    (``parts`` programs go over it twice). ``resident`` programs of a team fit the chip at once.
    """

    kind: str
    blocks: int
    parts: int
    rows: int  # of one part
    resident: int
    constants: dict[str, int]
    warps: int
    registers: int = 255  # that a thread may take so that as many are resident


class Workspace(NamedTuple):
    """Memory in which teams meet. Calls that run one after another may share one; calls at the same time may not."""

    counters: Tensor  # int32, of any value
    moments: Tensor  # float32

    @classmethod
    def on(cls, device: torch.device | str, counters: int = 1024, moments: int = 1 << 20) -> Workspace:
        """Allocate one: by default enough for any shape on chips of up to 168 multiprocessors."""
        kinds = ((counters, torch.int32), (moments, torch.float32))
        return cls(*(torch.zeros(size, device=device, dtype=dtype) for size, dtype in kinds))


def _lanes(C: int, groups: int, wanted: int) -> tuple[int, int]:
    """Return (groups in a block, lanes of a block): about ``wanted`` lanes, in steps of 8 if they fit."""
    width = C // groups
    lanes = max(wanted, triton.next_power_of_2(width))
    if lanes >= C:
        return groups, triton.next_power_of_2(C)
    fit = lanes // width
    step = 8 // gcd(8, width)
    return (fit - fit % step or fit), lanes


def _best(C: int, groups: int, wanted: int) -> tuple[int, int]:
    """Once or twice the lanes, whichever leaves fewer of them idle: 80 channels of 128, but 240 of 256."""
    choices = [_lanes(C, groups, wanted), _lanes(C, groups, 2 * wanted)]
    return min(choices, key=lambda choice: triton.cdiv(groups, choice[0]) * choice[1])


def plan(C: int, P: int, groups: int, dtype: torch.dtype, chip: Chip, residual: bool = False) -> Plan:
    """Cut ``[P, C]`` for a chip. The batch is not an argument: an image's bits must not depend on it."""
    tile = cast(NormTile, lookup("group_norm_silu", "whole", dtype, chip.architecture))
    fit, lanes = _lanes(C, groups, tile.channels)
    rows = triton.next_power_of_2(P)
    if rows * lanes <= tile.channels * tile.rows:
        return Plan("whole", triton.cdiv(groups, fit), 1, P, 0, _constants(C, groups, fit, lanes, rows), tile.warps)
    kind = "team_sum" if residual else "team"
    team = cast(TeamTile, lookup("group_norm_silu", kind, dtype, chip.architecture))
    fit, lanes = _best(C, groups, team.channels)
    blocks, resident = triton.cdiv(groups, fit), team.resident * chip.multiprocessors
    rows, least = (max(1, height * team.channels // lanes) for height in (team.rows, team.least))
    while rows > least and blocks * triton.cdiv(P, rows) < resident >= triton.cdiv(P, rows // 2):
        rows //= 2  # one image is to fill the chip
    parts = triton.cdiv(P, rows)
    if 2 <= parts <= min(resident, MOST_MEMBERS):
        # A piece is 16 bytes of each thread.
        piece = max(1, team.warps * 32 * 16 // (lanes * dtype.itemsize))
        constants = _constants(C, groups, fit, lanes, rows)
        constants |= {"PIECES": max(1, rows // piece), "BLOCK_T": triton.next_power_of_2(parts)}
        registers = min(255, REGISTERS // (team.resident * team.warps * 32))
        return Plan("team", blocks, parts, rows, resident, constants, team.warps, registers)
    tile = cast(NormTile, lookup("group_norm_silu", "split", dtype, chip.architecture))
    fit, lanes = _best(C, groups, tile.channels)
    blocks, rows = triton.cdiv(groups, fit), max(1, tile.rows * tile.channels // lanes)
    wanted = min(MOST_SPLITS, triton.cdiv(tile.waves * chip.multiprocessors, blocks), triton.cdiv(P, rows))
    each = triton.cdiv(P, wanted)
    return Plan("split", blocks, triton.cdiv(P, each), each, 0, _constants(C, groups, fit, lanes, rows), tile.warps)


def _constants(C: int, groups: int, fit: int, lanes: int, rows: int) -> dict[str, int]:
    return {"WIDTH": C // groups, "GROUPS": fit, "BLOCK_G": triton.next_power_of_2(fit), "BLOCK_C": lanes, "ROWS": rows}


class Call(NamedTuple):
    """One call, checked: images channels-last, everything on one device."""

    x: Tensor
    x_pixel: int | None  # from one pixel of x to the next, where it is a part of a wider buffer
    y: Tensor
    total: Tensor | None
    residual: Tensor | None
    row: Tensor | None
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    eps: float
    silu: bool

    def summed(self) -> Call:
        """The same once ``total`` is written: what follows reads that, not its parts again."""
        return (
            self
            if self.total is None
            else self._replace(x=self.total, x_pixel=None, total=None, residual=None, row=None)
        )


def _strides(*vectors: Tensor | None) -> list[int]:
    return [stride for v in vectors for stride in ((0, 0) if v is None else v.stride())]


def _launch(call: Call, chip: Chip, workspace: Workspace | None) -> None:
    N, C, H, W = call.x.shape
    cut = plan(C, H * W, call.groups, call.x.dtype, chip, call.residual is not None)
    # Fusion is stated because Triton 3.10 changes its default, and with it the bits.
    options = {"num_warps": cut.warps, "enable_fp_fusion": True}
    with torch.cuda.device_of(call.x):
        if cut.kind == "split":
            _split(call, cut, options)
        elif cut.kind == "team":
            _team(call, cut, options, workspace)
        else:
            parameters = (call.weight, call.bias, call.scale, call.shift)
            _whole_kernel[(N * cut.blocks,)](
                call.x, call.y, call.total, call.residual, call.row, *parameters, call.x_pixel, C, H * W, cut.blocks,
                call.eps,
                *_strides(call.row, call.scale, call.shift), **cut.constants, SILU=call.silu, **options,
            )  # fmt: skip


def _team(call: Call, cut: Plan, options: dict[str, Any], workspace: Workspace | None) -> None:
    """One cooperative launch; the interpreter, where programs do not run side by side, takes it in two halves."""
    N, C, H, W = call.x.shape
    items = N * cut.blocks
    teams = items if INTERPRETED else min(items, cut.resident // cut.parts)
    needed = (teams, teams * 2 * cut.parts * 3 * cut.constants["BLOCK_G"])
    if workspace is None:
        workspace = Workspace.on(call.x.device, *needed)
    if workspace.counters.numel() < needed[0] or workspace.moments.numel() < needed[1]:
        held = (workspace.counters.numel(), workspace.moments.numel())
        raise ShapeError(f"group_norm_silu: a workspace of {held} counters and moments; needed: {needed} or more")
    sizes = (C, H * W, items, cut.blocks, cut.parts, 0, call.eps)
    constants = {**cut.constants, "SILU": call.silu, **options, "num_stages": 1, "maxnreg": cut.registers}
    for phase in (1, 2) if INTERPRETED else (0,):
        parameters = (call.weight, call.bias, call.scale, call.shift, workspace.moments, workspace.counters)
        _team_kernel[(teams * cut.parts,)](
            call.x, call.y, call.total, call.residual, call.row, *parameters, call.x_pixel, *sizes,
            *_strides(call.row, call.scale, call.shift), **constants, PHASE=phase, launch_cooperative_grid=True,
        )  # fmt: skip
        call = call.summed()


def _split(call: Call, cut: Plan, options: dict[str, Any]) -> None:
    N, C, H, W = call.x.shape
    partial = torch.empty(N, cut.parts, 3, call.groups, device=call.x.device, dtype=torch.float32)
    grid, sizes = (N * cut.parts, cut.blocks), (C, H * W, call.groups, cut.parts, cut.rows)
    _reduce_kernel[grid](
        call.x, call.total, call.residual, call.row, partial, call.x_pixel, *sizes, *_strides(call.row),
        **cut.constants, **options,
    )  # fmt: skip
    call = call.summed()
    parameters = (call.weight, call.bias, call.scale, call.shift, partial)
    constants = {**cut.constants, "BLOCK_S": triton.next_power_of_2(cut.parts), "SILU": call.silu}
    _apply_kernel[grid](
        call.x, call.y, call.residual, call.row, *parameters, call.x_pixel, *sizes, call.eps,
        *_strides(call.row, call.scale, call.shift), **constants, **options,
    )  # fmt: skip


def _check(x: Tensor, groups: int, channels: dict[str, Tensor], rows: dict[str, Tensor | None]) -> None:
    if x.dim() != 4 or x.dtype not in DTYPES or x.numel() == 0:
        allowed = f"[N, C, H, W], not empty, in {', '.join(map(str, DTYPES))}"
        raise ShapeError(f"group_norm_silu: x {tuple(x.shape)} {x.dtype}; allowed: {allowed}")
    if groups < 1 or x.shape[1] % groups:
        raise ShapeError(f"group_norm_silu: {groups} groups; allowed: a divisor of C = {x.shape[1]}")
    check_vectors("group_norm_silu", tuple(x.shape[1:2]), channels)
    check_vectors("group_norm_silu", tuple(x.shape[:2]), rows)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Group normalisation of ``x + residual + row``, optional per-image modulation, optional SiLU, in one op.

    Args:
        x: ``[N, C, H, W]``, not empty; channels-last is read in place, also as some channels of a wider buffer; any
            other layout is copied to it and back.
        weight: ``[C]``.
        bias: ``[C]``.
        groups: number of groups; divides ``C``.
        eps: added to the variance.
        scale: ``[N, C]``, any strides, or None; the normalised value is multiplied by ``1 + scale``.
        shift: ``[N, C]``, any strides, or None; added after ``scale``.
        silu: apply ``y * sigmoid(y)`` last.
        row: ``[N, C]``, any strides, or None; added to ``x`` before the norm (a time embedding).
        residual: like ``x``, or None; added to ``x`` before the norm.
        total: like ``x``, or None; the sum is written here, and may take the place of ``x`` or ``residual``.
        out: like ``x``, or None; written and returned, and may be ``x`` itself.
        workspace: where teams meet, so that nothing is allocated and there is one launch; None: made for this call.

    Returns:
        ``[N, C, H, W]`` in the dtype and layout of ``x``; dense where that is a part of a wider buffer.

    Raises:
        ShapeError: if a shape, dtype or layout does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.

    Source: Wu and He 2018, arXiv:1803.08494.
    """
    _check(x, groups, {"weight": weight, "bias": bias}, {"scale": scale, "shift": shift, "row": row})
    for name, tensor in {"residual": residual, "total": total, "out": out}.items():
        check_like("group_norm_silu", name, tensor, x)
    given = tuple(t for t in (x, weight, bias, scale, shift, row, residual, total, out) if t is not None)
    chip = chip_of("group_norm_silu", given, interpreted=INTERPRETED)
    pixel = pixel_stride(x.permute(0, 2, 3, 1))
    apart = pixel if pixel != x.shape[1] else None
    rows = x if apart is not None else channels_last(x)  # the same tensor where x is channels-last
    y, summed = (writable(t, rows, torch.channels_last) for t in (out, total))
    sums = (None if total is None else summed, None if residual is None else channels_last(residual))
    vectors = (weight.contiguous(), bias.contiguous(), scale, shift)
    _launch(Call(rows, apart, y, *sums, row, *vectors, groups, eps, silu), chip, workspace)
    if total is not None and summed is not total:
        total.copy_(summed)
    if out is None:
        return y if rows is x else torch.empty_like(x).copy_(y)
    return out if y is out else out.copy_(y)
