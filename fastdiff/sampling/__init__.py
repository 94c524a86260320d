"""From a schedule to a sample. Knows floats and tensors; no networks, no files."""

from __future__ import annotations

from fastdiff.sampling.denoiser import Cond
from fastdiff.sampling.grid import GRIDS
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.prediction import PREDICTIONS
from fastdiff.sampling.run import sample
from fastdiff.sampling.solvers import SOLVERS

__all__ = ["GRIDS", "PATHS", "PREDICTIONS", "SOLVERS", "Cond", "sample"]
