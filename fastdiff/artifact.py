"""The manifest beside each exported file: what it is, what it was made from, and how far it is from the original."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.errors import ArtifactError
from fastdiff.models.files import inside, read_json, sha256, write_text


@dataclass(frozen=True)
class Manifest:
    """Facts about one exported file, written as ``<file>.json`` beside it."""

    # "unet": one network evaluation; "step": that without what "prepare" computes once, a graph of its own beside it;
    # "sampler": noise in, image out; "decoder": latents in, image out; "controlnet": as "step", residuals out;
    # "text_encoder": tokens in, what the network reads out
    kind: str
    sha256: str  # of the file
    model_sha256: str  # ``fingerprint`` of the weights it was made from
    inputs: dict[str, Any]  # name -> [dtype, shape]; a size that is free has a name
    outputs: dict[str, Any]
    opset: int
    versions: dict[str, str]
    sampler: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)  # what a float16 graph keeps in float32, and why
    dtype: str = "float32"  # in which the graph computes
    target: str = "onnxruntime"  # whom it was made for
    files: dict[str, str] = field(default_factory=dict)  # what else belongs to it, beside it: name -> sha256


def manifest_path(file: Path) -> Path:
    """Where the manifest of ``file`` lies."""
    return file.with_name(file.name + ".json")


def save_manifest(file: Path, manifest: Manifest) -> None:
    """Write the manifest whole or not at all."""
    write_text(manifest_path(file), json.dumps({"format": 1, **asdict(manifest)}, indent=2) + "\n")


def load_manifest(file: Path) -> Manifest:
    """Read the manifest of an exported file and check that the file is the one it describes.

    Raises:
        ArtifactError: if either is missing, or the file was changed or cut short.
    """
    if file.is_dir() or not file.is_file():
        raise ArtifactError(f"{file}: {'is a folder' if file.is_dir() else 'no such file'}; an exported file is needed")
    values = read_json(manifest_path(file))
    if values.pop("format", None) != 1:
        raise ArtifactError(f"{manifest_path(file)}: not format 1")
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise ArtifactError(f"{manifest_path(file)}: {error}") from error
    for name, wanted in {file.name: manifest.sha256, **manifest.files}.items():
        part = inside(file.parent, name)
        if not part.is_file():
            raise ArtifactError(f"{part}: no such file, though {manifest_path(file).name} names it; export it again")
        if sha256(part) != wanted:
            raise ArtifactError(f"{part}: its bytes are not those its manifest describes; export it again")
    return manifest
