"""Folders that ``fastdiff build`` made: graphs, engines and step tables, run without the model's code or weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastdiff.built.folder import BUILT, Folder, is_built, read_folder
from fastdiff.built.pipeline import BuiltPipeline
from fastdiff.built.text_to_image import BuiltTextToImage

__all__ = ["BUILT", "BuiltPipeline", "BuiltTextToImage", "Folder", "is_built", "load_built", "read_folder"]


def load_built(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    backend: str = "onnxruntime",
    trust: str | None = None,
) -> BuiltPipeline | BuiltTextToImage:
    """Load what ``fastdiff build`` made.

    Args:
        folder: holds ``built.json``.
        device: ``"cpu"`` or ``"cuda"``.
        backend: ``"onnxruntime"`` or ``"tensorrt"``.
        trust: SHA-256 of ``built.json``, printed by ``fastdiff build``: needed for engines made on another machine.

    Raises:
        ArtifactError: if the folder is damaged, or its engines were made elsewhere and it is not trusted.
        BackendError: if the backend cannot run here.
    """
    found = read_folder(Path(folder), trust)
    kind = BuiltPipeline if found.text is None else BuiltTextToImage
    return kind(found, torch.device(device), backend)
