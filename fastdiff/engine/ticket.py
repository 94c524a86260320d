"""What whoever makes a request holds in their hands: its state, its result, its previews, and the way to cancel it."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

QUEUED, RUNNING, PAUSED, DONE, FAILED = "queued", "running", "paused", "done", "failed"
_numbers = itertools.count()
_log = logging.getLogger(__name__)


class Preview(NamedTuple):
    """An image on its way."""

    step: int  # network evaluations so far
    steps: int  # of how many
    x: Tensor  # [1, C, H, W], the denoised estimate


Listener = Callable[["Preview | None"], None]


class Ticket:
    """One image that was asked for. All methods may be called from any thread.

    Args:
        priority: higher ones get places first.
        deadline: of ``time.monotonic``, or None.
        previews: how many are wanted, evenly over the steps.
        wake: called when the engine has to look at the ticket.
    """

    def __init__(
        self,
        priority: int = 0,
        deadline: float | None = None,
        previews: int = 0,
        wake: Callable[[], None] = lambda: None,
    ):
        self.number, self.priority, self.deadline, self.previews = next(_numbers), priority, deadline, previews
        self.state, self.made, self.cancelled, self.held = QUEUED, time.monotonic(), False, False
        self.started: float | None = None  # when it first got a place, of ``time.monotonic`` as all of these
        self.ended: float | None = None
        self._wake, self._done, self._lock = wake, threading.Event(), threading.Lock()
        self._result: Tensor | None = None
        self._error: BaseException | None = None
        self._listeners: list[Listener] = []
        self._kept: list[Preview] = []

    def cancel(self) -> None:
        """Give the image up: it leaves its place at the next step. Nothing happens to one that is finished."""
        self.cancelled = True
        self._wake()

    def pause(self) -> None:
        """Let the image leave its place after the step it is at, and keep what it has reached."""
        self.held = True
        self._wake()

    def resume(self) -> None:
        """Let a paused image queue up again, where it stood before."""
        self.held = False
        self._wake()

    def done(self) -> bool:
        """Is there a result, or an error?"""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Tensor:
        """Wait for the image ``[1, C, H, W]``, as the loop ends.

        Raises:
            EngineError: why there is none.
            TimeoutError: if it was not finished within ``timeout`` seconds; it runs on.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the image was not finished within {timeout} s; it runs on")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def seen(self) -> Iterator[Preview]:
        """Previews as they come, those of the past first, until the image is finished or fails."""
        waiting: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
        self.listen(waiting.put)
        while (preview := waiting.get()) is not None:
            yield preview

    def listen(self, call: Listener) -> None:
        """Have something called with every preview, those of the past included, and with None at the end.

        It is called by the engine's thread, which waits for it. An exception is logged, and costs nobody an image.
        """
        with self._lock:
            for preview in self._kept:
                _tell(call, preview)
            if not self._done.is_set():
                self._listeners.append(call)
                return
        _tell(call, None)

    # --- for the engine ---------------------------------------------------------------------------------------------

    def show(self, preview: Preview) -> None:
        """Hand a preview over."""
        with self._lock:
            self._kept.append(preview)
            for call in self._listeners:
                _tell(call, preview)

    def finish(self, result: Tensor | None, error: BaseException | None = None) -> None:
        """Answer. A request is answered once: a second answer is a fault of the engine's."""
        with self._lock:
            if self._done.is_set():
                raise RuntimeError(f"request {self.number} was answered before")
            self._result, self._error = result, error
            self.state, self.ended = FAILED if error is not None else DONE, time.monotonic()
            self._done.set()
            listeners, self._listeners = self._listeners, []
        for call in listeners:
            _tell(call, None)


def _tell(call: Listener, preview: Preview | None) -> None:
    try:
        call(preview)
    except Exception:
        _log.exception("a listener failed; its ticket goes on")
