"""The server as a deployment of Ray Serve: each replica has an engine and the whole HTTP application."""

from __future__ import annotations

import sys
from typing import Any

from fastdiff.errors import BackendError
from fastdiff.serve.logs import log_to
from fastdiff.serve.prompts import served_of
from fastdiff.serve.ray.cluster import Share
from fastdiff.serve.ray.source import Source
from fastdiff.serve.run import assemble
from fastdiff.serve.settings import Settings

NAME = "fastdiff"
COMPANY = 2  # requests in a replica for each place of its network: half of them wait, ready to join the batch
BUSY_SECONDS = 1.0  # after which a client that was turned away may come again
HEALTH_SECONDS = 2.0  # between two looks at a replica
TRIES = 3  # to start one


class Replica:
    """One engine and its application. Ray sends it requests, asks for its health, and starts another where it dies."""

    def __init__(self, source: Source, name: str, settings: Settings, level: str, threads: int):
        log_to(sys.__stderr__, level)  # Ray Serve puts another in its place, which leads to files
        served = served_of(source.load(threads), name, source.sizes, source.preview_decoder)
        self.engine, self._application = assemble(served, settings)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray sends requests to."""
        return self._application

    def check_health(self) -> None:
        """See Ray Serve.

        Raises:
            BackendError: if the engine has stopped, so that Ray replaces this replica.
        """
        if not self.engine.alive():
            raise BackendError("the engine has stopped")


def application(source: Source, name: str, settings: Settings, share: Share, level: str = "info") -> Any:
    """The server as a ``ray.serve.Application``, for ``ray.serve.run``.

    A replica takes ``COMPANY`` requests for each place of its network at once; up to ``settings.max_queue`` more wait
    at each proxy, and those beyond are told when to come again.

    Args:
        source: the model.
        name: what clients call it.
        settings: limits and key; where to listen is the proxies' affair.
        share: how many replicas, and what each takes; Ray starts and ends them with the load.
        level: of the replicas' logs.
    """
    from ray import serve

    number: dict[str, Any] = {"num_replicas": share.least}
    if share.most > share.least:
        full = {"target_ongoing_requests": settings.max_batch}
        number = {"autoscaling_config": {"min_replicas": share.least, "max_replicas": share.most, **full}}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="Images",
        ray_actor_options=share.options(),
        max_ongoing_requests=COMPANY * settings.max_batch,
        max_queued_requests=settings.max_queue,
        backpressure_config={"status_code": 503, "retry_after_s": BUSY_SECONDS},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain,
        max_constructor_retry_count=TRIES,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **number,
    )
    return deployment.bind(source, name, settings, level, share.cores)
