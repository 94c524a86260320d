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


class EngineError(FastdiffError, RuntimeError):
    """A request that an engine did not finish."""


class EngineBusy(EngineError):
    """The queue is full.

    Args:
        message: what is full.
        retry_after: seconds after which a place is likely to be free.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(EngineError):
    """The engine takes no requests any more."""


class Cancelled(EngineError):
    """The request was cancelled by whoever made it."""


class DeadlineExceeded(EngineError, TimeoutError):
    """The request could not, or would not, be finished in the time it was given."""


class NotFinite(EngineError, ArithmeticError):
    """The request's image became NaN or infinite."""


class OutOfMemory(EngineError, MemoryError):
    """There was not enough memory for the request."""
