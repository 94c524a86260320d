"""A model by name, so that a process on another machine can load it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from fastdiff.pipeline import BUNDLED, Pipeline, resolve
from fastdiff.text_to_image import TextToImage


class Source(NamedTuple):
    """Which model, and how it is to run. The folder has to be there on every machine."""

    model: str  # folder, or a bundled name
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    artifact: Path | None = None
    sizes: tuple[tuple[int, int], ...] = ()  # heights and widths that text-to-image models are asked for
    preview_decoder: Path | None = None

    def located(self) -> Source:
        """The same for a process with another working directory.

        Raises:
            ArtifactError: if there is no such model here.
        """
        folder = resolve(self.model)
        name = self.model if folder.parent == BUNDLED else str(folder.resolve())
        artifact, preview = (None if file is None else file.resolve() for file in (self.artifact, self.preview_decoder))
        return self._replace(model=name, artifact=artifact, preview_decoder=preview)

    def load(self, threads: int) -> Pipeline | TextToImage:
        """Load it in this process, which shall use so many CPU threads.

        Raises:
            FastdiffError: what ``Pipeline.from_pretrained`` raises.
        """
        torch.set_num_threads(threads)
        return Pipeline.from_pretrained(
            self.model, device=self.device, dtype=self.dtype, backend=self.backend, artifact=self.artifact
        )

    def digest(self) -> str:
        """One hash of all that decides what the model draws: the files of its folder, the exported file, the type."""
        folder, found = resolve(self.model), hashlib.sha256(f"{self.dtype} {self.backend}".encode())
        kinds = (".json", ".txt", ".safetensors", ".onnx", ".data")
        files = sorted(file for file in folder.rglob("*") if file.suffix in kinds and file.is_file())
        for file in [*files, *([] if self.artifact is None else [self.artifact])]:
            with file.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        return found.hexdigest()
