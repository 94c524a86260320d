"""A cluster of one's own for a while, or one that is there already; both ask for a token."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastdiff.errors import BackendError, PlanError
from fastdiff.serve.run import loopback

LOCAL = "local"
ENDING = (signal.SIGINT, signal.SIGTERM)
LEAST_RAY = "2.60"
KNOCK_SECONDS = 5.0
CORES = 4  # of a worker without a GPU, unless somebody says otherwise
TOKEN_MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# Ray reads these when it is imported, and hands them to every process of a cluster that it starts.
OF_OUR_OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: a node's address is the loopback's on any system
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # its 15 starves workers on machines that do anything else
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Ray's own lines are in its files alone
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",  # similar lines of different replicas are different requests
}
log = logging.getLogger("fastdiff.serve")


class Scale(NamedTuple):
    """How many workers (replicas of a server, or of a batch), and what each takes.

    Args:
        least: kept running.
        most: started under load; None: as many as fit the cluster.
        cores: of each; None: up to ``CORES``, or one where it has a GPU.
        gpus: of each.
    """

    least: int = 1
    most: int | None = None
    cores: int | None = None
    gpus: int = 0


class Share(NamedTuple):
    """A scale that fits a cluster."""

    least: int
    most: int
    cores: int
    gpus: int

    def options(self) -> dict[str, int]:
        """What Ray is told of each worker."""
        return {"num_cpus": self.cores, "num_gpus": self.gpus}


def check(scale: Scale) -> None:
    """Refuse what no cluster could give.

    Raises:
        PlanError: naming the number.
    """
    if scale.least < 1 or (scale.most is not None and scale.most < scale.least):
        raise PlanError(f"from {scale.least} to {scale.most} workers; allowed: from 1 on, and no fewer at most")
    if scale.cores is not None and scale.cores < 1:
        raise PlanError(f"{scale.cores} cores for each worker; allowed: 1 or more")


@contextmanager
def cluster(
    address: str = LOCAL, *, cores: int | None = None, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Be connected to a Ray cluster. In the main thread SIGINT and SIGTERM raise ``KeyboardInterrupt`` meanwhile.

    Args:
        address: ``"local"``: a cluster of this machine, which listens to no other, and ends with the block; else the
            address of one that runs, as ``ray.init`` takes it.
        cores: that a local cluster may use; by default all.
        variables: of the environment of its processes.

    Raises:
        BackendError: if ray is not installed, too old, or there is no such cluster.
    """
    installed()
    before = dict(os.environ)
    os.environ.setdefault(TOKEN_MODE, "token")
    if os.environ[TOKEN_MODE] != "token":
        log.warning("%s is %s: whoever reaches Ray's ports may run code there", TOKEN_MODE, os.environ[TOKEN_MODE])
    if address == LOCAL:
        os.environ.update(OF_OUR_OWN | dict(variables))
        if not any(map(os.environ.get, (TOKEN, TOKEN_FILE))) and not (Path.home() / ".ray" / "auth_token").exists():
            os.environ[TOKEN] = secrets.token_hex(32)  # Ray would write one to a file that others may read
    handled = {number: signal.getsignal(number) for number in ENDING}
    try:
        import ray

        try:
            with _nowhere_else(address):
                _connect(address, cores, variables)
            _handle(dict.fromkeys(ENDING, signal.default_int_handler))
            if address == LOCAL and not all(loopback(node["NodeManagerAddress"]) for node in ray.nodes()):
                raise BackendError(
                    "the cluster listens to other machines too, and is ended: this ray is not as expected"
                )
            yield
        finally:
            ray.shutdown()
    finally:
        _handle(handled)  # Ray puts its own in their place
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _nowhere_else(address: str) -> Iterator[None]:
    """Have ray take the loopback's address for that of this machine, also where somebody imported it before."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and address != LOCAL
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _connect(address: str, cores: int | None, variables: Mapping[str, str]) -> None:
    import ray

    try:
        if address == LOCAL:
            ray.init(address=LOCAL, num_cpus=cores, include_dashboard=False, logging_level="WARNING")
        else:
            _knock(address)
            ray.init(address=address, runtime_env={"env_vars": dict(variables)}, logging_level="WARNING")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        hint = f" (a cluster that asks for no token: {TOKEN_MODE}=disabled)" if "oken" in str(error) else ""
        raise BackendError(f"Ray at {address}: {last_line(error)}{hint}") from error


def _knock(address: str) -> None:
    """See whether anybody listens at ``host:port``: Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def installed() -> None:
    """Refuse to go on without ray.

    Raises:
        BackendError: if it is not installed, or too old.
    """
    if importlib.util.find_spec("ray") is None:
        raise BackendError("this needs ray: pip install 'fastdiff[ray]'")
    from importlib.metadata import version

    found = version("ray")
    if tuple(map(int, found.split(".")[:2])) < tuple(map(int, LEAST_RAY.split("."))):
        raise BackendError(f"ray is {found}; needed: {LEAST_RAY} or newer: pip install 'fastdiff[ray]'")


def fit(scale: Scale, wait: bool = False) -> Share:
    """What a scale means on the cluster that this process is connected to.

    Args:
        scale: as it was asked for.
        wait: whether machines may still join, so that what does not fit now is no error.

    Raises:
        PlanError: if not even one worker fits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = int(max((node.get("CPU", 0) for node in nodes), default=0))
    cores = scale.cores or (1 if scale.gpus else max(1, min(CORES, largest)))

    def on(node: dict[str, float]) -> int:
        by_cores = int(node.get("CPU", 0) // cores)
        return min(by_cores, int(node.get("GPU", 0) // scale.gpus)) if scale.gpus else by_cores

    fitting = sum(map(on, nodes))
    if fitting < scale.least:
        held = f"{largest} cores and {sum(node.get('GPU', 0) for node in nodes):g} GPUs" if nodes else "nothing"
        told = (f"{scale.least} workers of {cores} cores and {scale.gpus} GPUs do not fit a cluster of {len(nodes)} "
                f"machines with up to {held}; room is for {fitting}")  # fmt: skip
        if not wait:
            raise PlanError(told)
        log.warning("%s now: waiting for machines", told)
    return Share(scale.least, scale.most or max(fitting, scale.least), cores, scale.gpus)


def last_line(error: BaseException) -> str:
    """What went wrong in another process, out of the traceback that Ray passes on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("fastdiff.errors.")]
    if ours:
        return ours[-1].partition(": ")[2]
    return lines[-1] if lines else type(error).__name__
