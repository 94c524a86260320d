"""fastdiff: the fastest and most trustworthy way to run diffusion UNets."""

from __future__ import annotations

from importlib import metadata

from fastdiff.calibration import Calibration, calibrate
from fastdiff.engine import AsyncEngine, Engine
from fastdiff.errors import ArtifactError, BackendError, EngineError, FastdiffError, PlanError, ShapeError
from fastdiff.integrations.pipelines import optimize, restore, summary
from fastdiff.integrations.schedulers import from_diffusers_scheduler
from fastdiff.pipeline import Output, Pipeline
from fastdiff.sampling import Cond, iterate, sample

__version__ = metadata.version("fastdiff")
__all__ = [
    "ArtifactError",
    "AsyncEngine",
    "BackendError",
    "Calibration",
    "Cond",
    "Engine",
    "EngineError",
    "FastdiffError",
    "Output",
    "Pipeline",
    "PlanError",
    "ShapeError",
    "calibrate",
    "from_diffusers_scheduler",
    "iterate",
    "optimize",
    "restore",
    "sample",
    "summary",
]
