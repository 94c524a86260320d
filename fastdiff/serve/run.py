"""From settings to a server that listens, serves, and ends when it is told to."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from fastdiff.engine import Engine
from fastdiff.errors import PlanError
from fastdiff.serve.app import create_app
from fastdiff.serve.logs import log_to
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.models import Served
from fastdiff.serve.settings import Settings

log = logging.getLogger("fastdiff.serve")


def run(served: Served, settings: Settings, level: str, ready: Callable[[str], None]) -> None:
    """Serve a model until SIGINT or SIGTERM; requests in flight are finished first.

    Args:
        served: the model.
        settings: how to listen, and limits.
        level: of the log.
        ready: called with the server's URL once it listens.

    Raises:
        BackendError: if the model cannot be served.
        PlanError: if it is to draw more pixels than the settings allow.
        OSError: if the address cannot be had.
    """
    log_to(None, level)
    with listen(settings) as listening:
        engine, app = assemble(served, settings)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                http="h11",
                loop="asyncio",  # not whatever else may be installed: the socket above is made for it
                lifespan="on",
                timeout_graceful_shutdown=max(1, round(settings.drain)),
            )  # fmt: skip
        )
        warn_of_strangers(settings)
        url = url_of(listening)
        log.info("ready", extra={"facts": {"url": url, "model": served.name, "batching": engine.promises()}})
        ready(url)
        handled = signal.signal(signal.SIGTERM, _end)  # uvicorn raises it once more when it is done
        try:
            server.run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, handled)
            engine.close(drain=False)


def assemble(served: Served, settings: Settings) -> tuple[Engine, FastAPI]:
    """An engine, and the application in front of it.

    Raises:
        BackendError: if the model cannot be served.
        PlanError: if it is to draw more pixels than the settings allow.
    """
    for height, width in served.sizes:
        if height * width > settings.max_pixels:
            raise PlanError(f"size is {width}x{height}; allowed: up to {settings.max_pixels} pixels (--max-pixels)")
    metrics = Metrics()
    engine = Engine(
        served.pipeline, max_batch=settings.max_batch, max_queue=settings.max_queue, sizes=served.sizes,
        watch=metrics.turn,
    )  # fmt: skip
    return engine, create_app(engine, served, settings, metrics)


def warn_of_strangers(settings: Settings) -> None:
    """Say so where others may use a server."""
    if settings.api_key is None and not loopback(settings.host):
        log.warning("everybody who can reach %s may use this server: it has no API key", settings.host)


def _end(*_: object) -> None:
    """Told to end, and ended: no failure."""


def listen(settings: Settings) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # the protocol by name: asyncio sends small answers at once (TCP_NODELAY) on no other sockets, and clients that keep
    # their connection would wait 40 ms for each
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"{settings.host}:{settings.port}: {error.strerror or error}") from error
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a socket is reached."""
    return url_at(*listening.getsockname()[:2])


def url_at(host: str, port: int) -> str:
    """A host and a port as a URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def loopback(host: str) -> bool:
    """Can nobody else reach a server there?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
