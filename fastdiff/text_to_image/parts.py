"""What a text-to-image model is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as File

from fastdiff.integrations.schedulers import Sampler
from fastdiff.models.autoencoder import AutoencoderKL
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.text import TextEncoder
from fastdiff.models.tiny_autoencoder import AutoencoderTiny
from fastdiff.models.unet import UNet


@dataclass(frozen=True)
class Parts:
    """All of it, on one device."""

    unet: UNet
    vae: AutoencoderKL | AutoencoderTiny
    text_encoders: tuple[TextEncoder, ...]
    sampler: Sampler
    controlnets: tuple[ControlNet, ...] = ()
    xl: bool = False
    zero_empty_prompt: bool = False  # SDXL: no negative prompt is zeros, not the encoded empty text
    folder: File | None = None  # where they came from; the UNet's weights lie in ``unet``
    variant: str | None = None  # which of several weights


def usual_strength(xl: bool) -> float:
    """The strength of guidance of a call that names none."""
    return 5.0 if xl else 7.5
