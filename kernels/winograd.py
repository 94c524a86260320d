"""Winograd's minimal filtering for 3x3 convolutions in plain torch: the specification of the CPU runtime's.

``F(m x m, 3 x 3)`` gives ``m * m`` results from ``(m + 2)^2`` products, where the direct way takes ``9 * m * m``:
``Y = A^T [(G g G^T) * (B^T d B)] A``. Source: Winograd 1980; Lavin and Gray 2015, arXiv:1509.09308, eq. 8 and 11.

The matrices come from interpolation at 0, 1, -1 (and 2, -2 for ``m = 4``) and infinity. Larger tiles take points
further out and lose accuracy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# B^T, G, A^T by m
MATRICES: dict[int, tuple[list[list[float]], list[list[float]], list[list[float]]]] = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}  # fmt: skip


def matrices(m: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``B^T [m + 2, m + 2]``, ``G [m + 2, 3]`` and ``A^T [m, m + 2]`` in the type of ``like``.

    Raises:
        ValueError: if there is no such tile.
    """
    if m not in MATRICES:
        raise ValueError(f"Winograd tile is {m}; allowed: {', '.join(map(str, MATRICES))}")
    b, g, a = (like.new_tensor(rows) for rows in MATRICES[m])
    return b, g, a


def transform_weight(weight: Tensor, m: int) -> Tensor:
    """``weight [N, C, 3, 3]`` -> ``[(m + 2)^2, N, C]``, computed in float64 and rounded once."""
    _, g, _ = matrices(m, weight.double())
    frequencies = torch.einsum("ij,ncjk,lk->ilnc", g, weight.double(), g)
    return frequencies.flatten(0, 1).to(weight.dtype)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1.

    Args:
        x: ``[B, C, H, W]``, any size.
        weight: ``[N, C, 3, 3]``.
        bias: ``[N]`` or None.
        m: results of a tile in each direction, 2 or 4.

    Returns:
        ``[B, N, H, W]``.
    """
    batch, channels, height, width = x.shape
    b, _, a = matrices(m, x)
    down, across = -(-height // m), -(-width // m)
    padded = F.pad(x, (1, across * m + 1 - width, 1, down * m + 1 - height))
    tiles = padded.unfold(2, m + 2, m).unfold(3, m + 2, m)  # [B, C, down, across, m + 2, m + 2]
    image = torch.einsum("ij,bcyxjk,lk->ilbyxc", b, tiles, b).flatten(2, 4).flatten(0, 1)
    products = torch.bmm(image, transform_weight(weight, m).transpose(1, 2))
    sums = products.view(m + 2, m + 2, batch, down, across, -1)
    result = torch.einsum("ij,jkbyxn,lk->bnyixl", a, sums, a).reshape(batch, -1, down * m, across * m)
    result = result[:, :, :height, :width]
    return result if bias is None else result + bias[:, None, None]
