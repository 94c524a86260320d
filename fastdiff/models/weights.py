"""Model folders: safetensors and JSON in, model out. Nothing is unpickled, no code is imported from a folder.

A folder is what diffusers writes for a UNet (``config.json``, ``diffusion_pytorch_model.safetensors``) plus
``fastdiff.json``: which path and prediction the weights were trained for. A flow map's second time embedding lies in a
file of its own, so that diffusers loads the folder as the ordinary network it also is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.models.unet import TargetConfig, UNet, UNetConfig

CONFIG, MANIFEST = "config.json", "fastdiff.json"
WEIGHTS, TARGET_WEIGHTS = "diffusion_pytorch_model.safetensors", "target_embedding.safetensors"
TARGET_PREFIX = "target_embedding."
MAX_JSON_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ModelInfo:
    """What the weights mean: the part of a model that is not arithmetic (``fastdiff.json``)."""

    path: str = "straight"
    prediction: str = "velocity"
    target: TargetConfig | None = None
    classes: tuple[str, ...] = ()  # names of the labels people may ask for
    null_label: int | None = None  # the label that means "no class", for guidance
    guidance_scale: float = 1.0  # the default strength
    crop: int = 0  # pixels that were added at each border for training and are cut off again
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A loaded network and what it means."""

    network: UNet
    info: ModelInfo
    folder: Path | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a model folder.

    Raises:
        ArtifactError: if it is missing, not a plain file, too large, or not an object.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: no such file")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ArtifactError(f"{path}: is not a plain file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ArtifactError(f"{path}: {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({type(error).__name__}: {str(error)[:120]})") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: holds a {type(value).__name__}; allowed is one JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        ArtifactError: if it is missing, a folder, truncated, or of another format.
    """
    if path.is_dir():
        raise ArtifactError(f"{path}: is a folder; a .safetensors file is needed")
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{path}: not a whole safetensors file ({str(error)[:160]})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the text facts of a safetensors file that ``read_tensors`` has accepted."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module whose parameters may be on the meta device.

    Raises:
        ArtifactError: naming the first tensor that is missing, extra, of another shape or not of a float type.
    """
    wanted = module.state_dict()
    for name in wanted:
        if name not in tensors:
            raise ArtifactError(f"{source}: tensor {name!r} is missing ({len(wanted)} are needed)")
    for name, tensor in tensors.items():
        if name not in wanted:
            raise ArtifactError(f"{source}: tensor {name!r} does not belong to this model")
        if tensor.shape != wanted[name].shape:
            raise ArtifactError(f"{source}: {name!r} is {list(tensor.shape)}; needed: {list(wanted[name].shape)}")
        if not tensor.is_floating_point():
            raise ArtifactError(f"{source}: {name!r} is {tensor.dtype}; allowed are float types")
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def load_info(folder: Path) -> ModelInfo:
    """Read ``fastdiff.json``."""
    values = read_json(folder / MANIFEST)
    if values.pop("format", None) != 1:
        raise ArtifactError(f"{folder / MANIFEST}: not format 1")
    try:
        target = values.pop("target", None)
        return ModelInfo(
            **{**values, "classes": tuple(values.get("classes", ()))},
            target=TargetConfig(**target) if target else None,
        )
    except TypeError as error:
        raise ArtifactError(f"{folder / MANIFEST}: {error}") from error


def _check_info(info: ModelInfo, config: UNetConfig, file: Path) -> None:
    """Refuse values that would fail, or mean something else, only when the model is used."""

    def need(condition: bool, key: str, value: Any, allowed: str) -> None:
        if not condition:
            raise ArtifactError(f"{file}: {key} is {value!r}; allowed: {allowed}")

    def is_whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    labels, null, target = config.num_class_embeds or 0, info.null_label, info.target
    for key in ("path", "prediction"):
        need(isinstance(getattr(info, key), str), key, getattr(info, key), "a name")
    need(len(info.classes) <= labels, "classes", list(info.classes), f"at most num_class_embeds={labels} names")
    need(null is None or (is_whole(null) and 0 <= null < labels), "null_label", null, f"null or 0 to {labels - 1}")
    need(is_whole(info.crop) and 0 <= 2 * info.crop < config.sample_size, "crop", info.crop, "less than half an image")
    need(is_number(info.guidance_scale), "guidance_scale", info.guidance_scale, "a finite number")
    if target is not None:
        fits = is_whole(target.channels) and 2 <= target.channels <= 65536
        need(fits, "target.channels", target.channels, "a whole number from 2 to 65536")
        for key in ("scale", "max_period"):
            value = getattr(target, key)
            need(is_number(value) and value > 0, f"target.{key}", value, "a finite number above 0")


def load_model(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Model:
    """Load a model folder onto the CPU.

    Args:
        folder: holds ``config.json``, ``diffusion_pytorch_model.safetensors`` and ``fastdiff.json``.
        dtype: of the parameters in memory.

    Raises:
        ArtifactError: if anything is missing, damaged, foreign, or points out of the folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArtifactError(f"{root}: {'is a file' if root.exists() else 'no such folder'}; a model folder is needed")
    for name in (CONFIG, MANIFEST, WEIGHTS, TARGET_WEIGHTS):
        if (root / name).exists() and not (root / name).resolve().is_relative_to(root.resolve()):
            raise ArtifactError(f"{root / name}: is a link that leaves the model folder; refused")
    config, info = UNetConfig.from_dict(read_json(root / CONFIG)), load_info(root)
    _check_info(info, config, root / MANIFEST)
    tensors = read_tensors(root / WEIGHTS)
    if info.target is not None:
        tensors |= read_tensors(root / TARGET_WEIGHTS)
    with torch.device("meta"):
        network = UNet(config, info.target)
    load_strictly(network, tensors, str(root / WEIGHTS))
    network = network.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    return Model(network, info, root)


def save_model(model: Model, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
    """Write a model folder; each file appears whole or not at all."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in model.network.state_dict().items()}
    target = {name: tensors.pop(name) for name in list(tensors) if name.startswith(TARGET_PREFIX)}
    write_tensors(root / WEIGHTS, tensors, {"format": "pt"})
    if target:
        write_tensors(root / TARGET_WEIGHTS, target, {"format": "pt"})
    config = {key: value for key, value in asdict(model.network.config).items() if value is not None}
    write_text(root / CONFIG, json.dumps({"_class_name": "UNet2DModel", **config}, indent=2) + "\n")
    write_info(root, model.info)


def write_info(folder: Path, info: ModelInfo) -> None:
    """Write ``fastdiff.json``."""
    write_text(folder / MANIFEST, json.dumps({"format": 1, **asdict(info)}, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name in the same folder, then rename it."""
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name in the same folder, then rename it."""
    temporary = _temporary(path)
    try:
        save_file(dict(tensors), temporary, dict(metadata))
        temporary.chmod(0o644)  # safetensors writes files that nobody else may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> str:
    """Return one hash of all weights of a folder: that of the weights file, joined by the second time's if any."""
    target = folder / TARGET_WEIGHTS
    first = sha256(folder / WEIGHTS)
    return hashlib.sha256(f"{first} {sha256(target)}".encode()).hexdigest() if target.exists() else first
