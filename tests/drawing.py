"""Random inputs of the kernel tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Draw:
    """Seeded normal draws on one device; equal numbers on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)


def double(value: Any) -> Any:
    """Tensors in float64, the rest as it is."""
    return value.double() if isinstance(value, Tensor) else value


def poisoned(like: Tensor) -> Tensor:
    """A tensor shaped and laid out like another, full of NaN."""
    return torch.full_like(like, torch.nan)
