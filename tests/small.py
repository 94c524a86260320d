"""Model folders small enough to build in every test: random weights, but the whole of the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdiff.benchmarks.unet_parity import scramble
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import TargetConfig, UNet
from fastdiff.models.weights import Model, ModelInfo, save_model

CLASSES = ("zero", "one", "two")
SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
}


def make_model(*, two_time: bool = False, classes: bool = True, seed: int = 0, **sizes: Any) -> Model:
    """A tiny model: three classes and the label 3 for "no class", or none at all; with a target time or without."""
    config = UNetConfig.from_dict({**SIZES, "num_class_embeds": len(CLASSES) + 1 if classes else None, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config, TargetConfig(channels=8) if two_time else None)
    scramble(network, seed)
    info = ModelInfo(
        prediction="mean_velocity" if two_time else "velocity",
        target=network.target,
        classes=CLASSES if classes else (),
        null_label=len(CLASSES) if classes else None,
        crop=1,
    )
    return Model(network.eval().requires_grad_(False), info)


def make_folder(folder: Path, **options: Any) -> Path:
    """Save ``make_model(**options)`` in float32 and return its folder."""
    save_model(make_model(**options), folder, torch.float32)
    return folder
