"""Stable Diffusion 1, 2 and XL from published files."""

from __future__ import annotations

from fastdiff.text_to_image.loading import load_folder, load_single_file
from fastdiff.text_to_image.parts import Parts
from fastdiff.text_to_image.pipeline import DEFAULT_STEPS, TextToImage

__all__ = ["DEFAULT_STEPS", "Parts", "TextToImage", "load_folder", "load_single_file"]
