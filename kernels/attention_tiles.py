"""Tile sizes of attention, as data; see ``tiles.py``."""

from __future__ import annotations

from typing import NamedTuple


class AttentionTile(NamedTuple):
    """``queries`` rows against ``keys`` columns at a time; 0 keys: all of them in one tile."""

    queries: int
    keys: int
    warps: int
    stages: int


# (op, shape class, "half" or "float") -> rows of (first architecture, tile), oldest first.
# Shape classes: many or few queries (or cross: up to 128 keys) and the padded head size. The rows from 12.0 on go back
# to the small tiles: those chips have 99 KiB of shared memory for a program, not 227.
ATTENTION: dict[tuple[str, str, str], tuple[tuple[int, AttentionTile], ...]] = {
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
    ("attention", "many_64", "float"): ((80, AttentionTile(64, 16, 8, 2)), (120, AttentionTile(32, 32, 4, 2))),
    ("attention", "many_128", "float"): ((80, AttentionTile(32, 32, 8, 2)),),
    ("attention", "many_256", "float"): (
        (80, AttentionTile(32, 32, 8, 2)),
        (86, AttentionTile(32, 16, 8, 2)),
        (90, AttentionTile(32, 32, 8, 2)),
    ),
    ("attention", "few_64", "float"): ((80, AttentionTile(32, 32, 4, 2)),),
    ("attention", "few_128", "float"): ((80, AttentionTile(32, 32, 8, 2)),),
    ("attention", "few_256", "float"): ((80, AttentionTile(32, 16, 8, 2)), (90, AttentionTile(32, 32, 8, 2))),
    ("attention", "cross_64", "float"): ((80, AttentionTile(32, 32, 4, 2)),),
    ("attention", "cross_128", "float"): ((80, AttentionTile(32, 32, 8, 2)),),
    ("attention", "cross_256", "float"): ((80, AttentionTile(32, 16, 8, 2)),),
}
