"""What a backend is: a loaded model in, a network for the loop out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastdiff.models.weights import Model
from fastdiff.sampling.denoiser import Network


class Spec(NamedTuple):
    """How and where a model is to run."""

    device: torch.device
    dtype: torch.dtype
    artifact: Path | None = None  # the exported file, for backends that run one


Backend = Callable[[Model, Spec], Network]
