"""Model folders: safetensors and JSON in, model out. No code is imported from a folder, and none is run.

A folder is what diffusers writes for a UNet (``config.json``, ``diffusion_pytorch_model.safetensors``) plus
``fastdiff.json``: which path and prediction the weights were trained for. A flow map's second time embedding lies in a
file of its own, so that diffusers loads the folder as the ordinary network it also is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models.config import Transformer, UNetConfig
from fastdiff.models.files import (
    find_weights,
    inside,
    read_json,
    read_tensors,
    sha256,
    shown,
    write_tensors,
    write_text,
)
from fastdiff.models.unet import TargetConfig, UNet

CONFIG, MANIFEST = "config.json", "fastdiff.json"
STEM, TARGET_STEM = "diffusion_pytorch_model", "target_embedding"
WEIGHTS, TARGET_WEIGHTS = f"{STEM}.safetensors", f"{TARGET_STEM}.safetensors"
TARGET_PREFIX = "target_embedding."
# Parameters are copied into what the caller computes in; torch cannot convert the smaller floats of safetensors.
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
# At least: two norms, two convolutions and the time; three norms, eight projections without and four with a bias.
_TENSORS_PER_RESNET, _TENSORS_PER_TRANSFORMER = 10, 20


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
            raise ArtifactError(f"{source}: tensor {shown(name)} does not belong to this model")
        if tensor.shape != wanted[name].shape:
            raise ArtifactError(f"{source}: {name!r} is {list(tensor.shape)}; needed: {list(wanted[name].shape)}")
        if tensor.dtype not in _FLOATS:
            raise ArtifactError(f"{source}: {name!r} is {tensor.dtype}; allowed are float types")
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def check_total(module: nn.Module, limit: int, source: str) -> None:
    """Refuse a module, built on the meta device from a config, before any memory is taken for it.

    Args:
        module: its parameters and buffers are counted, not touched.
        limit: the most numbers that they may hold together: those in the weights file, or what fits in memory.
        source: the file that gave the sizes.

    Raises:
        ArtifactError: naming both counts.
    """
    total = sum(tensor.numel() for tensor in module.state_dict().values())
    if total > limit:
        raise ArtifactError(f"{source}: describes a network of {total} numbers; there are, or may be, {limit}")


def load_info(folder: Path) -> ModelInfo:
    """Read ``fastdiff.json``."""
    file = inside(folder, MANIFEST)
    values = read_json(file)
    if values.pop("format", None) != 1:
        raise ArtifactError(f"{file}: not format 1")
    target, classes = values.pop("target", None), values.pop("classes", [])
    for key, value, kind, allowed in (
        ("classes", classes, list, "a list of names"),
        ("target", target, dict | None, "null or an object"),
        ("training", values.get("training", {}), dict, "an object"),
    ):
        if not isinstance(value, kind):
            raise ArtifactError(f"{file}: {key} is {shown(value)}; allowed: {allowed}")
    try:
        return ModelInfo(**values, classes=tuple(classes), target=None if target is None else TargetConfig(**target))
    except TypeError as error:
        raise ArtifactError(f"{file}: {shown(str(error))}") from error


def _check_info(info: ModelInfo, config: UNetConfig, file: Path) -> None:
    """Refuse values that would fail, or mean something else, only when the model is used."""

    def need(condition: bool, key: str, value: Any, allowed: str) -> None:
        if not condition:
            raise ArtifactError(f"{file}: {key} is {shown(value)}; allowed: {allowed}")

    def is_whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_number(value: Any) -> bool:
        return is_whole(value) and abs(value) < 2**53 or isinstance(value, float) and math.isfinite(value)

    labels, null, target = config.num_class_embeds or 0, info.null_label, info.target
    for key in ("path", "prediction"):
        need(isinstance(getattr(info, key), str), key, getattr(info, key), "a name")
    need(all(isinstance(name, str) for name in info.classes), "classes", list(info.classes), "a list of names")
    need(len(info.classes) <= labels, "classes", list(info.classes), f"at most num_class_embeds={labels} names")
    need(null is None or (is_whole(null) and 0 <= null < labels), "null_label", null, f"null or 0 to {labels - 1}")
    fits = is_whole(info.crop) and (info.crop == 0 or 0 < 2 * info.crop < (config.sample_size or 0))
    need(fits, "crop", info.crop, "less than half of sample_size")
    need(is_number(info.guidance_scale), "guidance_scale", info.guidance_scale, "a finite number")
    if target is not None:
        fits = is_whole(target.channels) and 2 <= target.channels <= 65536
        need(fits, "target.channels", target.channels, "a whole number from 2 to 65536")
        for key in ("scale", "max_period"):
            value = getattr(target, key)
            need(is_number(value) and value > 0, f"target.{key}", value, "a finite number above 0")


def load_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Model:
    """Load a model folder onto the CPU.

    Args:
        folder: holds ``config.json``, ``fastdiff.json`` and the weights, whole or in shards.
        dtype: of the parameters in memory.
        variant: which of several weights, such as ``"fp16"``; see ``find_weights``.
        allow_pickle: read pickled weights where there are no safetensors, with torch's weights-only reader.

    Raises:
        ArtifactError: if anything is missing, damaged, foreign, or points out of the folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArtifactError(f"{root}: {'is a file' if root.exists() else 'no such folder'}; a model folder is needed")
    config, info = UNetConfig.from_dict(read_json(inside(root, CONFIG))), load_info(root)
    _check_info(info, config, root / MANIFEST)
    source = find_weights(root, STEM, variant, allow_pickle)[0]
    tensors = read_tensors(source, allow_pickle)
    if info.target is not None:
        tensors |= read_tensors(find_weights(root, TARGET_STEM)[0])
    network = _empty_network(config, info.target, tensors, source)
    load_strictly(network, tensors, str(source))
    network = network.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    return Model(network, info, root)


def load_unet(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    ops: Ops = REFERENCE,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    channels_last: bool = True,
) -> UNet:
    """Load the folder of a UNet, as diffusers writes it, onto the CPU.

    Without ``channels_last`` weights of the file's own type stay mapped: not one is copied.

    Raises:
        ArtifactError: if anything is missing, damaged, foreign, or points out of the folder.
    """
    root = Path(folder)
    config = UNetConfig.from_dict(read_json(inside(root, CONFIG)))
    source = find_weights(root, STEM, variant, allow_pickle)[0]
    tensors = read_tensors(source, allow_pickle)
    network = _empty_network(config, None, tensors, source)
    load_strictly(network, tensors, str(source))
    network.ops = ops
    layout = torch.channels_last if channels_last else torch.preserve_format
    return network.to(dtype=dtype, memory_format=layout).eval().requires_grad_(False)


def _empty_network(
    config: UNetConfig, target: TargetConfig | None, tensors: Mapping[str, Tensor], source: Path
) -> UNet:
    """Build the network on the meta device, unless the config asks for more of it than the tensors can fill."""
    needed = _least_tensors(config)
    if needed > len(tensors):  # building modules takes time and memory even where parameters take none
        raise ArtifactError(f"{source}: {len(tensors)} tensors; a network of these sizes has {needed} or more")
    with torch.device("meta"):
        network = UNet(config, target)
    check_total(network, sum(tensor.numel() for tensor in tensors.values()), str(source.with_name(CONFIG)))
    return network


def _least_tensors(config: UNetConfig) -> int:
    """A number of tensors below which no network of this config can be."""
    total = 0
    for level in config.down_levels() + config.up_levels():
        depth = level.attention.depth if isinstance(level.attention, Transformer) else 0
        total += level.resnets * (_TENSORS_PER_RESNET + depth * _TENSORS_PER_TRANSFORMER)
    return total


def save_model(model: Model, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
    """Write a model folder; each file appears whole or not at all."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in model.network.state_dict().items()}
    target = {name: tensors.pop(name) for name in list(tensors) if name.startswith(TARGET_PREFIX)}
    write_tensors(root / WEIGHTS, tensors, {"format": "pt"})
    if target:
        write_tensors(root / TARGET_WEIGHTS, target, {"format": "pt"})
    write_text(root / CONFIG, json.dumps(model.network.config.to_dict(), indent=2) + "\n")
    write_info(root, model.info)


def write_info(folder: Path, info: ModelInfo) -> None:
    """Write ``fastdiff.json``."""
    write_text(folder / MANIFEST, json.dumps({"format": 1, **asdict(info)}, indent=2) + "\n")


def fingerprint(folder: Path, variant: str | None = None) -> str:
    """Return one hash of all weights of a folder: that of the weights file, joined by those of any others.

    The others are the shards behind an index, and the second time's file.
    """
    files = find_weights(folder, STEM, variant)
    if (folder / TARGET_WEIGHTS).exists():
        files.append(inside(folder, TARGET_WEIGHTS))
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def weights_hash(network: nn.Module) -> str:
    """Return one hash of the weights of a network that came from no folder."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
