"""How far a build is: TensorRT's phases as progress bars, and a way to stop it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from fastdiff.backends.trt_library import Library


def make_monitor(library: Library, *, bars: bool = False, cancelled: Callable[[], bool] | None = None) -> Any:
    """Return an ``IProgressMonitor`` for one build.

    Args:
        library: gives the base class.
        bars: show a bar for each phase, nested ones below.
        cancelled: asked after every step; True stops the build.

    Returns:
        The monitor. What ``cancelled`` or an interrupt (Ctrl-C) raised lies in ``failure``: the library cannot pass an
        exception on, so whoever builds raises it again.
    """

    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, Any] = {}
            self.failure: BaseException | None = None
            self.stopped = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if bars:
                self.bars[name] = tqdm(total=steps, desc=name, position=len(self.bars), leave=parent is None)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if name in self.bars:
                    self.bars[name].update(step + 1 - self.bars[name].n)
                self.stopped = self.stopped or bool(cancelled is not None and cancelled())
            except BaseException as error:  # an exception would end in C++, where it is printed and lost
                self.failure, self.stopped = error, True
            return not self.stopped

        def phase_finish(self, name: str) -> None:
            if name in self.bars:
                self.bars.pop(name).close()

        def close(self) -> None:
            """Close the bars that a stopped build left open."""
            for name in list(self.bars):
                self.phase_finish(name)

    return Monitor()
