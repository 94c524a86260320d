"""Losses and a small trainer, for the bundled checkpoint and for whoever wants to train a UNet of this project."""

from __future__ import annotations

from fastdiff.training.data import Images, load_images
from fastdiff.training.losses import (
    Jumps,
    draw_jumps,
    jump_bounds,
    lsd_error,
    q_sample,
    regression_error,
    timesteps,
)
from fastdiff.training.trainer import CHECKPOINT, LOG, LOSSES, TrainConfig, Trainer, initialise

__all__ = [
    "CHECKPOINT",
    "LOG",
    "LOSSES",
    "Images",
    "Jumps",
    "TrainConfig",
    "Trainer",
    "draw_jumps",
    "initialise",
    "jump_bounds",
    "load_images",
    "lsd_error",
    "q_sample",
    "regression_error",
    "timesteps",
]
