"""What tests of autoencoders share: errors, and what diffusers writes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fastdiff.benchmarks.unet_parity import scramble

RELATIVE = 1e-5  # of the largest output, float32: two orders of summation
NEEDS_DIFFUSERS = "parity needs diffusers (pip install 'fastdiff[test]')"


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def rms_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).square().mean().sqrt() / wanted.std())


def saved(theirs: nn.Module, folder: Path) -> Path:
    """Weights and config as diffusers writes them."""
    scramble(theirs)
    theirs.save_pretrained(folder)
    return folder
