"""Pickled checkpoints, read only when asked for: torch's weights-only reader, and only what is a table of tensors."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.errors import ArtifactError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_pickle(path: Path, size: int) -> dict[str, Tensor]:
    """Read a checkpoint of ``size`` bytes written by ``torch.save``; a nested ``state_dict`` is unwrapped.

    Raises:
        ArtifactError: if it is damaged, holds anything but dense tensors, or unpacks to more than it weighs.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, which cannot be mapped
        if mapped:
            _check_stored(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises whatever its instructions run into
        line = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{path}: not a checkpoint of tensors alone ({type(error).__name__}: {line})") from error
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    if not isinstance(held, Mapping) or not held:
        raise ArtifactError(f"{path}: holds a {type(held).__name__}; needed: names and tensors")
    tensors: dict[str, Tensor] = {}
    for name, value in held.items():
        plain = isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
        if not plain or value.device.type != "cpu" or value.is_quantized:
            raise ArtifactError(f"{path}: {str(name)[:80]!r} is a {type(value).__name__}; needed: a dense tensor")
        tensors[name] = value.detach()
    # A tensor may repeat one stored number a billion times; tied weights count twice, hence the factor.
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    if total > 2 * size:
        raise ArtifactError(f"{path}: {total} bytes of tensors in a file of {size}; refused")
    return tensors


def _check_stored(path: Path) -> None:
    """Torch stores and never compresses: a compressed entry is foreign and may unpack to any size."""
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"entry {entry.filename[:80]!r} is compressed")
