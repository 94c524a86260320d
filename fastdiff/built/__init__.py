"""Folders that ``fastdiff build`` made: graphs, engines and step tables, run without the model's code or weights."""

from __future__ import annotations

from fastdiff.built.folder import BUILT, Folder, is_built, read_folder
from fastdiff.built.pipeline import BuiltPipeline

__all__ = ["BUILT", "BuiltPipeline", "Folder", "is_built", "read_folder"]
