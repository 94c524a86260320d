"""Running an image-to-image network over overlapping tiles, for images too large to hold at once.

Sizes are counted in latents, so that one plan serves both directions: an encoder reads ``shrink`` pixels per latent, a
decoder writes ``grow``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.errors import ShapeError


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin.

    Every tile is whole and the overlaps are as even as they can be: a narrow last tile would have poor statistics and
    little surrounding.

    Args:
        size: of the axis, at least 1.
        tile: of one tile; ``tile > overlap``.
        overlap: that neighbours share at least.

    Returns:
        Rising starts, the first 0 and the last ``size - tile``; ``[0]`` if one tile is enough.
    """
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [i * (size - tile) // (count - 1) for i in range(count)]


def tile_weights(starts: list[int], size: int, tile: int, margin: int, scale: int) -> Tensor:
    """How much each tile counts along one axis.

    Where a tile overlaps its neighbour it counts nothing for ``margin``, where it lacks its surrounding, and then rises
    in a straight line until the neighbour's margin begins: of all rises from 0 to 1 without a jump, the one that
    averages most.

    Args:
        starts: from ``tile_starts``.
        size: of the axis.
        tile: of one tile, at most ``size``.
        margin: at most half of the least overlap; if equal, one tile takes over from the next without blending.
        scale: output pixels per latent.

    Returns:
        ``[tiles, tile * scale]`` float64; the weights of each output pixel add up to 1.
    """
    inside = (torch.arange(tile * scale, dtype=torch.float64) + 0.5) / scale - margin
    weights = torch.ones(len(starts), tile * scale, dtype=torch.float64)
    for i in range(1, len(starts)):
        width = starts[i - 1] + tile - starts[i] - 2 * margin
        rise = (inside / width).clamp(0, 1) if width else (inside > 0).double()
        weights[i] *= rise
        weights[i - 1] *= rise.flip(0)
    places = torch.tensor(starts)[:, None] * scale + torch.arange(tile * scale)
    total = torch.zeros(size * scale, dtype=torch.float64).index_add_(0, places.flatten(), weights.flatten())
    return weights / total[places]


def run_tiled(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    radius: int | None,
    shrink: int = 1,
    grow: int = 1,
) -> Tensor:
    """Apply a network tile by tile and blend the results.

    Args:
        network: ``[B, C, h * shrink, w * shrink] -> [B, C', h * grow, w * grow]``.
        x: ``[B, C, H * shrink, W * shrink]``.
        tile: height and width of a tile, in latents; an axis that is not longer is not cut.
        overlap: that neighbouring tiles share at least, in latents.
        radius: how far the network looks from one latent, in latents; None if it looks at the whole image. With
            ``overlap >= 2 * radius`` nothing is used that lacks its surrounding, and the result is that of one call.
            With less, a quarter of the overlap is left out at each side. Where the whole tile is wrong by its
            statistics, its rim is hardly worse than the rest: nothing is left out, and more is averaged.
        shrink: input pixels per latent.
        grow: output pixels per latent.

    Returns:
        ``[B, C', H * grow, W * grow]`` in the dtype of the network's output; added up in float32 or wider.

    Raises:
        ShapeError: if ``tile`` or ``overlap`` is out of range.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ShapeError(f"tile {tile} with overlap {overlap}; allowed: tile >= 1 and 0 <= overlap < tile")
    margin = 0 if radius is None else radius if 2 * radius <= overlap else overlap // 4
    axes = []
    for size in (x.shape[2] // shrink, x.shape[3] // shrink):
        length = min(size, tile)
        starts = tile_starts(size, tile, overlap)
        axes.append((starts, length, tile_weights(starts, size, length, margin, grow)))
    (tops, height, rows), (lefts, width, columns) = axes
    out = None
    for top, row in zip(tops, rows, strict=True):
        for left, column in zip(lefts, columns, strict=True):
            part = x[:, :, top * shrink : (top + height) * shrink, left * shrink : (left + width) * shrink]
            y = network(part)
            wide = torch.promote_types(y.dtype, torch.float32)
            if out is None:
                whole = (x.shape[2] // shrink * grow, x.shape[3] // shrink * grow)
                out = torch.zeros((*y.shape[:2], *whole), dtype=wide, device=y.device)
            weights = (row[:, None] * column).to(device=y.device, dtype=wide)
            place = out[:, :, top * grow : (top + height) * grow, left * grow : (left + width) * grow]
            place += weights * y
    assert out is not None
    return out.to(y.dtype)
