"""Graphs and engines of a built folder, opened once they are what was put there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.artifact import load_manifest
from fastdiff.backends.ort import OrtNetwork, network_from
from fastdiff.backends.ort_session import Runner, open_session
from fastdiff.built.folder import Folder
from fastdiff.errors import BackendError
from fastdiff.models.files import sha256

RUNTIMES = ("onnxruntime", "tensorrt")


def open_graph(folder: Folder, name: str, device: torch.device) -> Runner:
    """Open a graph of a folder, checked with all that lies beside it.

    Raises:
        ArtifactError: if anything is missing or altered.
        BackendError: if onnxruntime cannot run it here.
    """
    file, _ = folder.file(name), folder.file(f"{name}.json")
    load_manifest(file)  # checks what lies beside the graph too
    return Runner(open_session(file, device), device)


def open_network(folder: Folder, name: str, device: torch.device) -> OrtNetwork:
    """Open the graphs of a UNet; see ``open_graph``."""
    file, _ = folder.file(name), folder.file(f"{name}.json")
    return network_from(file, device, None)


def check_runtime(backend: str) -> None:
    """Refuse what a built folder does not run on.

    Raises:
        BackendError: naming what it does.
    """
    if backend not in RUNTIMES:
        raise BackendError(f"backend is {backend!r}; a built folder runs on: {', '.join(RUNTIMES)}")


def plan_here(folder: Folder, plans: Mapping[str, str], device: torch.device) -> str:
    """The engine for this GPU.

    Raises:
        BackendError: if there is no GPU, or the folder has no engine for it.
    """
    from fastdiff.backends.trt import architecture_of

    here = architecture_of(device)
    if here not in plans:
        built = ", ".join(plans) or "no GPU"
        raise BackendError(f"{folder.root}: has engines for {built}; this GPU is {here}: use 'onnxruntime'")
    return plans[here]


def open_engine(folder: Folder, plan: str, device: torch.device) -> Any:
    """Open an engine of a folder; see ``fastdiff.backends.trt.load_engine``."""
    from fastdiff.backends.trt import load_engine

    return load_engine(folder.file(plan), device, _trusted(folder))


def open_engines(folder: Folder, plan: str, device: torch.device) -> Any:
    """Open the engines of a UNet; see ``fastdiff.backends.trt.load_network``."""
    from fastdiff.backends.trt import load_network

    return load_network(folder.file(plan), device, trusted=_trusted(folder))


def beside(plan: str, graph: str) -> str:
    """The engine of another graph for the same GPU."""
    return (Path(plan).parent / f"{Path(graph).stem}.plan").as_posix()


def _trusted(folder: Folder) -> list[str]:
    """Manifests of engines that the caller vouches for by naming the hash of the folder's description."""
    if not folder.trusted:
        return []
    return [sha256(folder.file(name)) for name in folder.files if name.endswith(".plan.json")]
