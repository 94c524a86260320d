"""Does an autoencoder give back the picture? The published tiny one for FLUX.2, measured on real images.

``python -m fastdiff.benchmarks.autoencoder_quality WEIGHTS DATA`` prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.models.autoencoder_files import load_tiny_chains

ENCODER, DECODER = "taef2_encoder.safetensors", "taef2_decoder.safetensors"
SIDE = 4  # images along one side of the mosaic


def mosaic(data: Path) -> Tensor:
    """Return the first 16 test images of a CIFAR-10 archive, row by row, as one ``[1, 3, 128, 128]`` in [0, 1]."""
    with np.load(data, allow_pickle=False) as arrays:
        images = arrays["test_images"][: SIDE * SIDE]
    count, height, width, channels = images.shape
    tiles = torch.from_numpy(images).reshape(SIDE, count // SIDE, height, width, channels)
    return tiles.permute(4, 0, 2, 1, 3).reshape(1, channels, SIDE * height, count // SIDE * width).float() / 255


def psnr(got: Tensor, wanted: Tensor) -> float:
    """Return the peak signal-to-noise ratio, in dB, of two images in [0, 1] of one shape."""
    return float(-10 * (got.double() - wanted.double()).square().mean().log10())


@torch.no_grad()
def round_trip(weights: Path, data: Path) -> dict[str, Any]:
    """Encode and decode a mosaic of real images in float32.

    Args:
        weights: a folder with ``taef2_encoder.safetensors`` and ``taef2_decoder.safetensors``.
        data: an archive whose ``test_images`` are ``[N, 32, 32, 3]`` uint8.

    Returns:
        ``psnr_db`` of the picture that comes back, clamped to [0, 1], and ``latent_mean`` and ``latent_std``.
    """
    network = load_tiny_chains(weights / ENCODER, weights / DECODER)
    image = mosaic(data)
    latents = network.encode(image * 2 - 1)
    back = ((network.decode(latents) + 1) / 2).clamp(0, 1)
    return {
        "psnr_db": psnr(back, image),
        "latent_mean": float(latents.mean()),
        "latent_std": float(latents.std()),
    }


if __name__ == "__main__":
    print(json.dumps(round_trip(Path(sys.argv[1]), Path(sys.argv[2]))))
