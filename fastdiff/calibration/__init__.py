"""Few-step samplers fitted to one trained network."""

from __future__ import annotations

from fastdiff.calibration.file import Calibration, Fitted
from fastdiff.calibration.run import Settings, calibrate

__all__ = ["Calibration", "Fitted", "Settings", "calibrate"]
