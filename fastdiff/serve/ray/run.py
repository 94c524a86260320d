"""``fastdiff serve --ray``: from settings to a deployment that serves, and ends when it is told to."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout

from fastdiff.errors import BackendError, PlanError
from fastdiff.serve.logs import log_to
from fastdiff.serve.ray.cluster import LOCAL, Scale, Share, cluster, fit, installed, last_line
from fastdiff.serve.ray.cluster import check as check_scale
from fastdiff.serve.ray.front import IMPORT_PATH
from fastdiff.serve.ray.replica import NAME, application
from fastdiff.serve.ray.source import Source
from fastdiff.serve.run import listen, log, url_at, warn_of_strangers
from fastdiff.serve.settings import Settings

FRONT = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Ray ends a proxy that does not answer for so long. Its own 5 s are too few where a busy machine imports it.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30"}


def run(
    source: Source,
    name: str,
    settings: Settings,
    scale: Scale,
    level: str,
    ready: Callable[[str], None],
    address: str = LOCAL,
) -> None:
    """Serve a model from a Ray cluster until ``KeyboardInterrupt``; replicas finish what they draw first.

    Args:
        source: the model.
        name: what clients call it.
        settings: how to listen, and limits.
        scale: how many replicas, and what each takes.
        level: of the log.
        ready: called with the URL once the first replicas serve.
        address: of the cluster, see ``cluster``; one that runs keeps running, less this application.

    Raises:
        BackendError: if ray is not installed, there is no such cluster, or no replica can be started.
        PlanError: if not even the least number of replicas fits.
        OSError: if the address to listen at cannot be had on this machine.
    """
    installed()
    check_scale(scale)
    source = source.located()
    if address == LOCAL:
        settings = settings.model_copy(update={"port": _free(settings)})
    elif settings.port == 0:
        raise PlanError("--port is 0; allowed on a cluster that runs: 1 to 65535, the same on every machine")
    log_to(None, level)
    warn_of_strangers(settings)
    out = sys.stdout
    # Ray prints lines of its own between those that programs read
    with redirect_stdout(sys.stderr), cluster(address, variables=_variables(settings, address)):
        share = fit(scale, wait=address != LOCAL)
        try:
            _deploy(source, name, settings, share, level)
            url = url_at(settings.host, settings.port)
            log.info("ready", extra={"facts": {"url": url, "model": name, **share._asdict()}})
            with redirect_stdout(out):
                ready(url)
            threading.Event().wait()
        finally:
            _end(address)


def _free(settings: Settings) -> int:
    """The port to listen at: Ray's proxy says little where it cannot have it, and takes no "any"."""
    with listen(settings) as listening:
        return int(listening.getsockname()[1])


def _variables(settings: Settings, address: str) -> dict[str, str]:
    """What the proxies have to know. Not the key where others can read it: replicas get that with their settings."""
    limits = ("max_body", "body_timeout", "max_requests")
    told = {f"FASTDIFF_SERVE_{limit.upper()}": str(getattr(settings, limit)) for limit in limits}
    if settings.api_key is not None and address == LOCAL:
        told["FASTDIFF_SERVE_API_KEY"] = settings.api_key.get_secret_value()
    return told | {FRONT: IMPORT_PATH} | PATIENCE


def _deploy(source: Source, name: str, settings: Settings, share: Share, level: str) -> None:
    from ray import serve
    from ray.exceptions import RayError

    logging.getLogger("ray.serve").setLevel("WARNING")
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=quiet)
    except (TimeoutError, RayError) as error:
        raise BackendError(f"Ray's proxy did not start: {last_line(error)}") from error
    try:
        serve.run(application(source, name, settings, share, level), name=NAME, route_prefix="/")
    except (RuntimeError, serve.exceptions.RayServeException) as error:
        found = serve.status().applications.get(NAME)
        why = RuntimeError(found.deployments["Images"].message) if found and found.deployments else error
        raise BackendError(f"no replica could be started: {last_line(why)}") from error


def _end(address: str) -> None:
    from ray import serve

    if address == LOCAL:
        serve.shutdown()
    else:
        serve.delete(NAME)
