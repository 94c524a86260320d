"""Training images: an ``.npz`` in, a batch out."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError


class Images(NamedTuple):
    """A labelled data set: ``images [N, C, H, W]`` uint8, padded; ``labels [N]`` int64."""

    images: Tensor
    labels: Tensor
    original_size: int  # of the images before padding

    def batch(self, rows: Tensor) -> Tensor:
        """Rows of the set as float32 in [-1, 1]."""
        return self.images[rows].float() / 127.5 - 1.0


def load_images(file: Path, size: int, split: str = "train") -> Images:
    """Read an ``.npz`` with ``{split}_images`` (uint8, HW or HWC) and ``{split}_labels``, padded with 0 to ``size``.

    Raises:
        ArtifactError: if the file or one of its arrays is missing or not as described.
    """
    try:
        # numpy leaves a file that it opened and could not read open
        with Path(file).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    except (OSError, ValueError, KeyError, EOFError, MemoryError, TypeError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{file}: need an .npz with {split}_images and {split}_labels ({error})") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ArtifactError(f"{file}: images are {images.dtype} {images.shape}; allowed: uint8, N x H x W (x C)")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not labels.size or labels.min() < 0:
        raise ArtifactError(
            f"{file}: labels are {labels.dtype} {labels.shape} for {len(images)} images; allowed: one whole number, "
            "0 or more, for each image"
        )
    tensor = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    missing = size - tensor.shape[-1]
    if missing < 0 or missing % 2 or tensor.shape[-1] != tensor.shape[-2]:
        raise ArtifactError(
            f"{file}: images are {tuple(tensor.shape[-2:])}; they must be square and pad evenly to {size}"
        )
    padded = nn.functional.pad(tensor, [missing // 2] * 4)
    return Images(padded.contiguous(), torch.from_numpy(labels.astype(np.int64)), tensor.shape[-1])
