"""The step-level batching engine: images of any sampler, step count, guidance and seed share one running batch."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.eager import ops_for
from fastdiff.engine.batch import Image, step
from fastdiff.engine.bucket import Bucket, Stats, Turn, leaves_for_good, most_places, shape_of, short_of_memory
from fastdiff.engine.promise import examine
from fastdiff.engine.ticket import PAUSED, QUEUED, RUNNING, Preview, Ticket
from fastdiff.engine.waiting import Waiting
from fastdiff.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
    NotFinite,
    OutOfMemory,
    PlanError,
    ShapeError,
)
from fastdiff.pipeline import Pipeline
from fastdiff.sampling.denoiser import Gathering, NetworkDenoiser, Place
from fastdiff.sampling.noise import PhiloxNoise
from fastdiff.sampling.run import Ready
from fastdiff.text_to_image import TextToImage

MAX_HISTORY = 4  # registers of every image: those of all samplers but the longest multistep ones
EXAMINED_ROWS = 3  # steps of the runs that a network is examined with


class Engine:
    """Serve one model to many callers. Any number of threads may submit; one thread of the engine's runs the network.

    The same request with the same seed gives the same bits, alone or in company: at the start the network is examined
    for the batch sizes that keep them, and no others are used.

    Args:
        pipeline: of a class-conditional or unconditional model, or of text to image.
        max_batch: the network's places in one evaluation; a guided image takes two.
        max_queue: images that may wait, in all buckets together.
        max_history: registers for past estimates; samplers that need more are refused.
        sizes: heights and widths of images that may be asked for, where the model leaves a choice; by default its own.
        watch: called by the engine's thread after every step, which waits for it.

    Raises:
        BackendError: if the pipeline's backend cannot run images of different requests together.
    """

    def __init__(
        self,
        pipeline: Pipeline | TextToImage,
        *,
        max_batch: int = 8,
        max_queue: int = 256,
        max_history: int = MAX_HISTORY,
        sizes: Sequence[tuple[int, int]] = (),
        watch: Callable[[Turn], object] | None = None,
    ):
        if max_batch < 2 or max_queue < 1:
            raise PlanError(f"max_batch is {max_batch} and max_queue {max_queue}; allowed: from 2, and from 1")
        if not isinstance(pipeline.network, Gathering):
            raise BackendError(f"{type(pipeline.network).__name__} cannot run images of different requests together")
        self.pipeline, self.max_history, self._most = pipeline, max_history, max_batch
        self._ops, self._watch = ops_for(pipeline.device), watch
        self._buckets: dict[tuple[int, ...], Bucket] = {}
        self._waiting: Waiting[Image] = Waiting(max_queue)
        self._paused: list[Image] = []
        self._wake = threading.Condition()
        self._open, self._stopped, self._halted = True, False, False
        self._steps = self._images = 0
        self._answered: Counter[str] = Counter()
        for height, width in sizes:
            self._plan_for({"height": height, "width": width})
        if not sizes:
            self._plan_for({})
        self._thread = threading.Thread(target=self._run, name="fastdiff-engine", daemon=True)
        self._thread.start()

    # --- for callers ------------------------------------------------------------------------------------------------

    def submit(
        self,
        class_label: int | None = None,
        *,
        prompt: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        previews: int = 0,
        **options: Any,
    ) -> Ticket:
        """Ask for one image.

        Args:
            class_label: of a class-conditional model.
            prompt: of a text-to-image model.
            priority: higher ones get places first.
            timeout: seconds in which the image is wanted; it is given up where that cannot be, or is not, kept.
            previews: how many are wanted on the way, evenly over the steps.
            options: of a call of the pipeline, for one image; masks, guides, ControlNets and generators are not taken.

        Returns:
            The ticket; its image is ``[1, C, H, W]`` as the loop ends, see ``images``.

        Raises:
            EngineBusy: if the queue is full.
            EngineClosed: after ``close``.
            PlanError: on options that do not fit one another.
            ShapeError: on labels, seeds, latents or sizes that do not fit the model or were not planned for.
        """
        self.admissible()
        asked: Any = class_label if prompt is None else prompt
        ready = self.pipeline.ready(asked, history=self.max_history, **options)
        deadline = None if timeout is None else time.monotonic() + timeout
        ticket = Ticket(priority, deadline, previews, self._notice)
        image = self._image(ready, ticket)
        with self._wake:
            self.admissible()
            self._waiting.push(shape_of(image), image)
            self._wake.notify_all()
        return ticket

    def generate(self, class_label: int | None = None, *, timeout: float | None = None, **options: Any) -> Tensor:
        """Ask for one image and wait for it: ``[1, C, H, W]`` in [0, 1].

        Args:
            class_label: of a class-conditional model.
            timeout: seconds in which the image is wanted.
            options: of ``submit``.

        Raises:
            EngineError: why there is none; and what ``submit`` raises.
        """
        return self.images(self.submit(class_label, timeout=timeout, **options).result())

    def images(self, x: Tensor, output_type: str = "pt") -> Any:
        """What the loop ends with, or a preview, as images: of ``Pipeline``'s ``output_type``."""
        return self.pipeline.finish(x, output_type)

    def pause(self) -> None:
        """Stop after the step that is under way; what was asked for waits."""
        with self._wake:
            self._halted = True

    def resume(self) -> None:
        """Go on after ``pause``."""
        with self._wake:
            self._halted = False
            self._wake.notify_all()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: finish what was asked for; else, and when ``timeout`` seconds are over, it fails with
                ``EngineClosed``.
            timeout: in seconds.
        """
        with self._wake:
            self._open = False
            self._wake.notify_all()
            if drain:
                self._halted = False
                self._wake.wait_for(lambda: self._stopped or self._idle(), timeout)
            self._stopped = True
            self._wake.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> Stats:
        """What has been done, and what is going on."""
        with self._wake:
            running = sum(len(bucket.running) for bucket in self._buckets.values())
            return Stats(len(self._waiting), running, self._steps, self._images, dict(self._answered))

    def accepting(self) -> bool:
        """Does it take requests? Not after ``close``, nor after a fault of its own."""
        return self._open

    def alive(self) -> bool:
        """Does its thread run? Not after ``close``, nor after a fault of its own."""
        return self._thread.is_alive()

    def promises(self) -> dict[str, str]:
        """For each shape, in which batches images keep their bits."""
        return {"x".join(map(str, shape)): bucket.promise.describe() for shape, bucket in self._buckets.items()}

    # --- admission --------------------------------------------------------------------------------------------------

    def admissible(self) -> None:
        """Is there a place in the queue? For those who have work to do before they ask.

        Raises:
            EngineBusy: if the queue is full.
            EngineClosed: after ``close``.
        """
        with self._wake:
            if not self._open:
                raise EngineClosed("the engine is closed")
            if self._waiting.full():
                raise EngineBusy(f"{self._waiting.limit} images wait already", self._relief())

    def _relief(self) -> float:
        """Seconds until a place in the queue is likely to be free."""
        rows = [image.rows - image.row for bucket in self._buckets.values() for image in bucket.running]
        slowest = max((bucket.seconds for bucket in self._buckets.values()), default=0.0)
        return max(0.1, slowest * min(rows, default=1))

    def _image(self, ready: Ready, ticket: Ticket) -> Image:
        """What a run brings, as one image of a batch.

        Raises:
            PlanError: if it cannot share one.
        """
        denoiser = ready.denoiser
        own = type(denoiser) is NetworkDenoiser and denoiser.guide is None and denoiser.network is self.pipeline.network
        if not own or not isinstance(ready.noise, PhiloxNoise) or len(ready.state.x) != 1:
            raise PlanError(
                "an engine takes one image at a time, from a seed, without mask, guide, ControlNet or generator"
            )
        if any(row.deep is not None for row in ready.table.structure.rows):
            raise PlanError("an engine takes no step caching (cache_interval): its images stand at different steps")
        shape = tuple(ready.state.x.shape[1:])
        if shape not in self._buckets:
            planned = ", ".join("x".join(map(str, known)) for known in self._buckets)
            raise ShapeError(f"an image of {'x'.join(map(str, shape))} was not planned for; allowed: {planned}")
        return Image(ticket, ready.table, ready.prepared, int(ready.noise.seeds), ready.state)

    def _plan_for(self, size: Mapping[str, Any]) -> None:
        """Run every batch size of one shape once, before anybody waits for it, and keep those that keep the bits."""
        places, shape = [], ()
        for i, example in enumerate(self.pipeline.examples()):
            ready = self.pipeline.ready(example, num_inference_steps=EXAMINED_ROWS, seed=i, **size)
            rows, shape = ready.table.structure.rows, tuple(ready.state.x.shape[1:])
            halves = 1 + any(row.guided is not None for row in rows)
            places += [Place(ready.prepared, half, row) for row in range(len(rows)) for half in range(halves)]
        promise = examine(self.pipeline.network, places, shape, self._most, self.pipeline.device)
        self._buckets[shape] = Bucket(self._most, promise)

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _notice(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _idle(self) -> bool:
        return not len(self._waiting) and not self._paused and not any(b.running for b in self._buckets.values())

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            with self._wake:  # a fault of the engine's own: nobody may wait for ever
                self._open, self._stopped = False, True
                self._fail_all()
            raise

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._tidy()
                if self._stopped:
                    self._fail_all()
                    return
                self._fill()
                if self._halted or not any(bucket.running for bucket in self._buckets.values()):
                    self._wake.wait(self._next_deadline())  # a request, or a word from whoever made one, ends it too
                    continue
                turns = [bucket for bucket in self._buckets.values() if bucket.running]
            for bucket in turns:
                self._turn(bucket)

    def _next_deadline(self) -> float | None:
        """Seconds until somebody who waits, or is paused, is late."""
        idle = [*self._waiting.items(), *self._paused]
        deadlines = [image.ticket.deadline for image in idle if image.ticket.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _fill(self) -> None:
        """Give free places to those who wait."""
        if self._halted:
            return
        for shape in self._waiting.buckets():
            bucket = self._buckets[shape]
            while (image := self._waiting.pop(shape)) is not None:
                if not bucket.room(image):
                    self._waiting.push(shape, image)
                    break
                late = image.ticket.deadline is not None and (
                    time.monotonic() + bucket.seconds * (image.rows - image.row) > image.ticket.deadline
                )
                if late:
                    self._answer(image, DeadlineExceeded("there is not enough time left for all of its steps"))
                    continue
                image.ticket.state = RUNNING
                if image.ticket.started is None:
                    image.ticket.started = time.monotonic()
                bucket.running.append(image)

    def _tidy(self) -> None:
        """Take out who cancelled, is late or paused, and put back who resumed."""
        now = time.monotonic()

        def leaves(image: Image) -> bool:
            ticket = image.ticket
            return ticket.cancelled or ticket.held or (ticket.deadline is not None and now > ticket.deadline)

        out = list(self._waiting.remove(leaves))
        for bucket in self._buckets.values():
            out += [image for image in bucket.running if leaves(image)]
            bucket.running = [image for image in bucket.running if not leaves(image)]
        back = [image for image in self._paused if not image.ticket.held or leaves_for_good(image, now)]
        self._paused = [image for image in self._paused if image not in back]
        for image in out + back:
            ticket = image.ticket
            if ticket.cancelled:
                self._answer(image, Cancelled("the request was cancelled"))
            elif ticket.deadline is not None and now > ticket.deadline:
                self._answer(image, DeadlineExceeded("the time for the request is over"))
            elif ticket.held:
                ticket.state = PAUSED
                self._paused.append(image)
            else:
                ticket.state = QUEUED
                self._waiting.push(shape_of(image), image)
        if self._idle():
            self._wake.notify_all()

    def _turn(self, bucket: Bucket) -> None:
        """One step of a bucket's images."""
        images = list(bucket.running)
        begin = time.monotonic()
        try:
            states, denoised = step(self.pipeline.network, images, bucket.promise, self._ops)
            finite = torch.stack([state.x.isfinite().all() for state in states]).tolist()
        except Exception as error:
            self._broken(bucket, images, error)
            return
        seconds = time.monotonic() - begin
        bucket.timed(seconds)
        if self._watch is not None:
            self._watch(Turn(seconds, len(images), sum(image.places for image in images), bucket.width))
        with self._wake:
            self._steps += 1
            self._images += len(images)
        for i, (image, state) in enumerate(zip(images, states, strict=True)):
            image.state, image.row = state, image.row + 1
            if not finite[i]:
                self._leave(bucket, image, NotFinite(f"the image is not finite after step {image.row} of {image.rows}"))
            elif image.row == image.rows:
                self._leave(bucket, image)
            else:
                self._show(image, denoised[i : i + 1])

    def _show(self, image: Image, denoised: Tensor) -> None:
        """Hand a preview over, if one is due."""
        wanted = image.ticket.previews * image.row // image.rows
        if wanted > image.shown:
            image.shown = wanted
            image.ticket.show(Preview(image.row, image.rows, denoised.clone()))

    def _broken(self, bucket: Bucket, images: Sequence[Image], error: Exception) -> None:
        """A step failed as a whole; nothing was changed. Fail as few images as possible."""
        if short_of_memory(error):
            victim = images[-1]
            bucket.width = max(1, sum(most_places(image) for image in images[:-1]))
            self._leave(bucket, victim, OutOfMemory(f"not enough memory beside {len(images) - 1} other images"))
        elif len(images) == 1:
            self._leave(bucket, images[0], error)
        else:
            for image in images:  # alone each, with the same bits, so that only the culprit fails
                bucket.running = [image]
                self._turn(bucket)
            done = [image for image in images if image.ticket.done()]
            bucket.running = [image for image in images if image not in done]

    def _leave(self, bucket: Bucket, image: Image, error: Exception | None = None) -> None:
        with self._wake:
            bucket.running = [other for other in bucket.running if other is not image]
            self._answer(image, error)

    def _answer(self, image: Image, error: Exception | None = None) -> None:
        self._answered["done" if error is None else type(error).__name__] += 1
        image.ticket.finish(None if error is not None else image.state.x.clone(), error)

    def _fail_all(self) -> None:
        images = [*self._waiting.remove(lambda _: True), *self._paused]
        images += [image for bucket in self._buckets.values() for image in bucket.running]
        for bucket in self._buckets.values():
            bucket.running = []
        self._paused = []
        for image in images:
            self._answer(image, EngineClosed("the engine was closed before the image was finished"))
