"""What Prometheus reads: times of waiting, steps, pictures and whole requests; how full the batches are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastdiff.engine import Engine, Ticket, Turn

_FINE = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WIDE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.queue = Histogram("fastdiff_queue_seconds", "From request to first place, of each image",
                               buckets=_WIDE, registry=registry)  # fmt: skip
        self.encode = Histogram("fastdiff_encode_seconds", "From a checked request to what the engine is asked for",
                                buckets=_FINE, registry=registry)  # fmt: skip
        self.step = Histogram("fastdiff_step_seconds", "One evaluation of the network for a batch",
                              buckets=_FINE, registry=registry)  # fmt: skip
        self.decode = Histogram("fastdiff_decode_seconds", "From the end of the loop to the bytes of a picture",
                                buckets=_FINE, registry=registry)  # fmt: skip
        self.request = Histogram("fastdiff_request_seconds", "From request to end of answer",
                                 ["route", "status"], buckets=_WIDE, registry=registry)  # fmt: skip
        self.occupancy = Histogram("fastdiff_batch_occupancy", "Share of the network's places taken, of each step",
                                   buckets=[k / 8 for k in range(1, 9)], registry=registry)  # fmt: skip
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def turn(self, turn: Turn) -> None:
        """Take note of a step; for ``Engine(watch=...)``."""
        self.step.observe(turn.seconds)
        self.occupancy.observe(min(1.0, turn.places / turn.width))

    def waited(self, tickets: Sequence[Ticket]) -> None:
        """Take note of how long images waited for their first place."""
        for ticket in tickets:
            if ticket.started is not None:
                self.queue.observe(ticket.started - ticket.made)

    def follow(self, engine: Engine) -> None:
        """Show an engine's counts whenever somebody asks."""
        self.registry.register(_Engine(engine))


class _Engine(Collector):
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """See ``Collector``."""
        stats = self._engine.stats()
        yield GaugeMetricFamily("fastdiff_waiting_images", "Images that wait for a place", stats.waiting)
        yield GaugeMetricFamily("fastdiff_running_images", "Images in the running batch", stats.running)
        yield CounterMetricFamily("fastdiff_steps", "Evaluations of the network", stats.steps)
        yield CounterMetricFamily("fastdiff_image_steps", "Images in them, summed up", stats.images)
        images = CounterMetricFamily("fastdiff_images", "Images answered, by outcome", labels=["outcome"])
        for outcome, count in stats.answered.items():
            images.add_metric([outcome], count)
        yield images
