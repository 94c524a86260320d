"""Tile sizes by (op, shape class, dtype, architecture), as data. Nothing is tuned at run time.

A row says: from this compute capability on, cut the work so. The sizes were chosen by counting the registers
and shared memory of the compiled kernels (no spills in half precision, shared memory within each chip); they
have not been timed yet. Whoever times them edits the table, not the kernels.

No entry may depend on the batch: an image keeps its bits whatever company it travels in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import BackendError

OLDEST = 80  # compute capability 8.0, the first one that Triton supports


class NormTile(NamedTuple):
    """``rows`` pixels by about ``channels`` channels; ``waves`` programs wanted per multiprocessor."""

    channels: int
    rows: int
    waves: int
    warps: int
    stages: int = 1


class AttentionTile(NamedTuple):
    """``queries`` rows against ``keys`` columns at a time; 0 keys: all of them in one tile."""

    queries: int
    keys: int
    warps: int
    stages: int


class CombineTile(NamedTuple):
    """``elements`` of one image."""

    elements: int
    warps: int
    stages: int = 1


class Chip(NamedTuple):
    """What the launchers need to know of a device: compute capability times ten, and its multiprocessors."""

    architecture: int
    multiprocessors: int


INTERPRETER = Chip(OLDEST, 4)  # few multiprocessors, so that small test images still split

Tile = NormTile | AttentionTile | CombineTile

# (op, shape class, "half" or "float") -> rows of (first architecture, tile), oldest first.
# Shape classes: group norm, does an image's tile stay on chip ("whole") or not ("split"); attention, many or
# few queries (or cross: up to 128 keys) and the padded head size. The rows from 12.0 on go back to the small
# tiles: those chips have 99 KiB of shared memory for a program, not 227.
TILES: dict[tuple[str, str, str], tuple[tuple[int, Tile], ...]] = {
    ("group_norm_silu", "whole", "half"): ((80, NormTile(64, 256, 1, 8)),),
    ("group_norm_silu", "whole", "float"): ((80, NormTile(64, 256, 1, 8)),),
    ("group_norm_silu", "split", "half"): ((80, NormTile(128, 32, 2, 4)),),
    ("group_norm_silu", "split", "float"): ((80, NormTile(128, 16, 2, 4)),),
    ("attention", "many_64", "half"): (
        (80, AttentionTile(128, 64, 8, 3)),
        (90, AttentionTile(128, 128, 8, 3)),
        (120, AttentionTile(128, 64, 8, 3)),
    ),
    ("attention", "many_128", "half"): (
        (80, AttentionTile(128, 64, 8, 2)),
        (90, AttentionTile(128, 128, 8, 2)),
        (120, AttentionTile(128, 64, 8, 2)),
    ),
    ("attention", "many_256", "half"): (
        (80, AttentionTile(64, 16, 4, 2)),
        (90, AttentionTile(128, 64, 8, 2)),
        (120, AttentionTile(64, 16, 4, 2)),
    ),
    ("attention", "few_64", "half"): ((80, AttentionTile(64, 64, 4, 3)),),
    ("attention", "few_128", "half"): (
        (80, AttentionTile(64, 32, 4, 2)),
        (90, AttentionTile(64, 64, 4, 2)),
        (120, AttentionTile(64, 32, 4, 2)),
    ),
    ("attention", "few_256", "half"): (
        (80, AttentionTile(64, 16, 4, 2)),
        (90, AttentionTile(64, 32, 4, 2)),
        (120, AttentionTile(64, 16, 4, 2)),
    ),
    ("attention", "cross_64", "half"): ((80, AttentionTile(64, 0, 4, 1)),),
    ("attention", "cross_128", "half"): ((80, AttentionTile(64, 0, 4, 1)),),
    ("attention", "cross_256", "half"): (
        (80, AttentionTile(16, 0, 4, 1)),
        (90, AttentionTile(64, 0, 8, 1)),
        (120, AttentionTile(16, 0, 4, 1)),
    ),
    ("attention", "many_64", "float"): ((80, AttentionTile(64, 32, 8, 2)),),
    ("attention", "many_128", "float"): ((80, AttentionTile(32, 32, 8, 2)),),
    ("attention", "many_256", "float"): ((80, AttentionTile(32, 32, 8, 2)),),
    ("attention", "few_64", "float"): ((80, AttentionTile(32, 32, 4, 2)),),
    ("attention", "few_128", "float"): ((80, AttentionTile(32, 32, 8, 2)),),
    ("attention", "few_256", "float"): ((80, AttentionTile(32, 16, 8, 2)),),
    ("attention", "cross_64", "float"): ((80, AttentionTile(32, 32, 4, 2)),),
    ("attention", "cross_128", "float"): ((80, AttentionTile(32, 32, 4, 2)),),
    ("attention", "cross_256", "float"): ((80, AttentionTile(32, 16, 8, 2)),),
    ("combine", "any", "float"): ((80, CombineTile(1024, 4)),),
    ("add", "any", "half"): ((80, CombineTile(4096, 4)),),
    ("add", "any", "float"): ((80, CombineTile(2048, 4)),),
}


def lookup(op: str, shape: str, dtype: torch.dtype, architecture: int) -> Tile:
    """Return the newest row that ``architecture`` (compute capability times ten, 90 for 9.0) may use.

    Raises:
        BackendError: if the device is older than every row.
    """
    rows = TILES[op, shape, "float" if dtype == torch.float32 else "half"]
    for first, tile in reversed(rows):
        if architecture >= first:
            return tile
    raise BackendError(f"{op}: compute capability {architecture / 10}; allowed: {OLDEST / 10} and newer")


def chip_of(op: str, tensors: tuple[Tensor, ...], *, interpreted: bool) -> Chip:
    """Return the chip that holds ``tensors``; every launcher begins here.

    Raises:
        BackendError: if the tensors lie on several devices or on one that Triton cannot reach, or if autograd
            would record this call: the kernels have no backward.
    """
    device = tensors[0].device
    others = sorted({str(t.device) for t in tensors if t.device != device})
    if others:
        raise BackendError(f"{op}: tensors on {device} and {', '.join(others)}; allowed: one device")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise BackendError(f"{op}: an input requires grad; forward only, allowed: torch.no_grad() or REFERENCE")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)
    if interpreted and device.type == "cpu":
        return INTERPRETER
    raise BackendError(f"{op}: tensors on {device}; allowed: cuda, or cpu in Triton's interpreter (TRITON_INTERPRET=1)")
