"""TensorRT or TensorRT for RTX: which of them is here, and what it says when it refuses."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from fastdiff.errors import BackendError
from fastdiff.models.files import one_line

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
# What an engine of TensorRT for RTX can be built for; a Hopper GPU (sm90) is not among them.
RTX_ARCHITECTURES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


class Library(NamedTuple):
    """One of the two, imported. Their Python interfaces are the same but for what is asked of ``rtx`` here."""

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        """As the library tells it."""
        return str(self.module.__version__)

    @property
    def rtx(self) -> bool:
        """Is it TensorRT for RTX: compiles kernels where the engine runs, and builds without a GPU?"""
        return self.name == "tensorrt_rtx"


def find_library(name: str | None = None) -> Library:
    """Import the library asked for, or the one installed; of two, TensorRT, which serves every GPU.

    Raises:
        BackendError: saying what to install, or what the library said as it failed to load.
    """
    if name is not None and name not in TITLES:
        raise BackendError(f"unknown library {name!r}; allowed: {', '.join(TITLES)}")
    for candidate in TITLES if name is None else (name,):
        try:
            return Library(candidate, importlib.import_module(candidate))
        except ModuleNotFoundError as error:
            if error.name != candidate:
                raise BackendError(f"{TITLES[candidate]} does not load: {one_line(error)}") from error
        except (ImportError, OSError) as error:
            raise BackendError(f"{TITLES[candidate]} does not load: {one_line(error)}") from error
    wanted = "TensorRT is" if name is None else f"{TITLES[name]} is"
    extras = " or ".join(f"pip install 'fastdiff[{EXTRAS[each]}]'" for each in (TITLES if name is None else (name,)))
    raise BackendError(f"{wanted} not installed: {extras}")


def make_logger(library: Library) -> Any:
    """Return a logger for the library that keeps its errors in ``errors`` and prints nothing."""
    severity = library.module.ILogger

    class Errors(library.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(one_line(message, 400))

        def said(self) -> str:
            """What went wrong since this was last asked: the first error, as those behind it follow from it."""
            errors, self.errors = self.errors, []
            return errors[0] if errors else "it gave no reason"

    return Errors()
