"""Graphs of a built folder, opened in onnxruntime once they are what was put there."""

from __future__ import annotations

import torch

from fastdiff.artifact import load_manifest
from fastdiff.backends.ort import OrtNetwork, network_from
from fastdiff.backends.ort_session import Runner, open_session
from fastdiff.built.folder import Folder


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
