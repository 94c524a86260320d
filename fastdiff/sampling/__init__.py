"""From a schedule to a sample. Knows floats and tensors; no networks, no files."""

from __future__ import annotations

from fastdiff.sampling.clipping import DynamicThreshold
from fastdiff.sampling.denoiser import Cond
from fastdiff.sampling.grid import GRIDS
from fastdiff.sampling.guidance import APG, CFG, GUIDANCES, CFGPlusPlus, CFGZeroStar
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.prediction import PREDICTIONS
from fastdiff.sampling.run import Step, iterate, sample
from fastdiff.sampling.solvers import SOLVERS

__all__ = [
    "APG",
    "CFG",
    "GRIDS",
    "GUIDANCES",
    "PATHS",
    "PREDICTIONS",
    "SOLVERS",
    "CFGPlusPlus",
    "CFGZeroStar",
    "Cond",
    "DynamicThreshold",
    "Step",
    "iterate",
    "sample",
]
