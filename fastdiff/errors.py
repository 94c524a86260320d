"""Everything fastdiff raises on purpose. Each message names the value received and the values allowed."""

from __future__ import annotations


class FastdiffError(Exception):
    """Base class: catch it to catch every deliberate error of this library."""


class PlanError(FastdiffError, ValueError):
    """A path, prediction, grid and solver that cannot be combined, or an option outside its range."""


class ShapeError(FastdiffError, ValueError):
    """A tensor, label or seed that does not fit the model or the batch."""


class BackendError(FastdiffError, RuntimeError):
    """A backend that is unknown, not installed, or could not load."""


class ArtifactError(FastdiffError, ValueError):
    """A model folder or exported file that is missing, damaged, foreign or unsafe."""
