"""Tile sizes by (op, shape class, dtype, architecture), as data. Nothing is tuned at run time.

A row says: from this compute capability on, cut the work so. The sizes were chosen by counting the registers
and shared memory of the compiled kernels (no spills in half precision, shared memory within each chip); they
have not been timed yet. Whoever times them edits the table, not the kernels.

No entry may depend on the batch: an image keeps its bits whatever company it travels in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff.errors import BackendError

from .attention_tiles import ATTENTION, AttentionTile

OLDEST = 80  # compute capability 8.0, the first one that Triton supports


class NormTile(NamedTuple):
    """``rows`` pixels by about ``channels`` channels; ``waves`` programs wanted per multiprocessor."""

    channels: int
    rows: int
    waves: int
    warps: int


class TeamTile(NamedTuple):
    """At most ``rows`` pixels, at least ``least``, by about ``channels``; ``resident`` programs per multiprocessor."""

    channels: int
    rows: int
    least: int
    resident: int
    warps: int


class RowTile(NamedTuple):
    """About ``elements`` of whole rows (layer norm), or of rows cut every ``lanes`` (GEGLU)."""

    elements: int
    warps: int
    lanes: int = 0


class CombineTile(NamedTuple):
    """``elements`` of one image."""

    elements: int
    warps: int


class Chip(NamedTuple):
    """What the launchers need to know of a device: compute capability times ten, and its multiprocessors."""

    architecture: int
    multiprocessors: int


INTERPRETER = Chip(OLDEST, 4)  # few multiprocessors, so that small test images still split

Tile = NormTile | TeamTile | RowTile | AttentionTile | CombineTile

# (op, shape class, "half" or "float") -> rows of (first architecture, tile), oldest first.
# Shape classes of group norm: an image's tile fits one program ("whole"), several that meet ("team",
# "team_sum" with a residual), or none.
TILES: dict[tuple[str, str, str], tuple[tuple[int, Tile], ...]] = {
    ("group_norm_silu", "whole", "half"): ((80, NormTile(64, 256, 1, 8)),),
    ("group_norm_silu", "whole", "float"): ((80, NormTile(64, 256, 1, 8)),),
    ("group_norm_silu", "team", "half"): ((80, TeamTile(128, 128, 16, 2, 8)), (120, TeamTile(128, 64, 16, 2, 8))),
    ("group_norm_silu", "team", "float"): ((80, TeamTile(128, 64, 16, 2, 8)),),
    ("group_norm_silu", "team_sum", "half"): ((80, TeamTile(128, 128, 16, 2, 8)), (90, TeamTile(128, 64, 16, 2, 8))),
    ("group_norm_silu", "team_sum", "float"): ((80, TeamTile(128, 64, 16, 2, 8)),),
    ("group_norm_silu", "split", "half"): ((80, NormTile(128, 32, 2, 4)),),
    ("group_norm_silu", "split", "float"): ((80, NormTile(128, 16, 2, 4)),),
    ("layer_norm", "any", "half"): ((80, RowTile(4096, 4)),),
    ("layer_norm", "any", "float"): ((80, RowTile(4096, 4)),),
    ("geglu", "any", "half"): ((80, RowTile(2048, 4, 256)),),
    ("geglu", "any", "float"): ((80, RowTile(1024, 4, 256)),),
    ("combine", "any", "float"): ((80, CombineTile(1024, 4)),),
    ("add", "any", "half"): ((80, CombineTile(4096, 4)),),
    ("add", "any", "float"): ((80, CombineTile(2048, 4)),),
    **ATTENTION,
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
