"""Text-to-image models from files: a diffusers folder, or one original checkpoint. Nothing is unpickled unasked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.backends.eager import checked_device, ops_for
from fastdiff.errors import ArtifactError
from fastdiff.integrations.schedulers import from_diffusers_scheduler
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models import single_file
from fastdiff.models.autoencoder import AutoencoderKL, AutoencoderKLConfig, wide
from fastdiff.models.autoencoder_files import load_autoencoder
from fastdiff.models.config import UNetConfig
from fastdiff.models.controlnet import ControlNet, ControlNetConfig
from fastdiff.models.files import find_weights, inside, read_json, read_metadata, read_tensors, shown
from fastdiff.models.text import TextEncoder, text_encoder_of
from fastdiff.models.unet import UNet
from fastdiff.models.weights import fingerprint, load_strictly, load_unet
from fastdiff.text_to_image.parts import Parts
from fastdiff.text_to_image.pipeline import TextToImage

INDEX, EXPORTED = "model_index.json", ("onnxruntime", "tensorrt")
# the kinds of calls that one loaded model answers, whichever of them the folder was saved by
TEXT_TO_IMAGE = tuple(
    f"{family}{kind}Pipeline"
    for family in ("StableDiffusion", "StableDiffusionXL")
    for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
) + ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
TEXT_PARTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
Source = str | os.PathLike[str]


def load_folder(
    folder: Source,
    *,
    controlnet: Source | Sequence[Source] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    artifact: Source | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> TextToImage:
    """Load a folder with a ``model_index.json``, as diffusers writes it.

    Args:
        folder: saved by a pipeline of ``TEXT_TO_IMAGE``, with ``unet``, ``vae``, ``scheduler``, tokenizers and
            text encoders. Safety checkers and feature extractors are not run.
        controlnet: folders of ControlNets to load beside it.
        device: where to run.
        dtype: of the networks; the loop is float32, and so is an autoencoder that overflows in float16.
        backend: of the UNet, ``"onnxruntime"``, ``"tensorrt"`` or one of ``fastdiff.backends.in_memory.network_of``.
        artifact: the exported UNet, for ``"onnxruntime"`` (by default ``unet/unet.onnx`` in the folder), or its engine,
            for ``"tensorrt"`` (``unet/unet.plan``). The weights of the UNet are not loaded then.
        variant: which of several weights, such as ``"fp16"``.
        allow_pickle: read pickled UNet and autoencoder weights where there are no safetensors.

    Raises:
        ArtifactError: if anything is missing, damaged, foreign, or points out of the folder.
        BackendError: if transformers is not installed, or the device is not there.
    """
    root = Path(folder)
    index = read_index(root)
    place, ops = _device(device)
    home, exported = part_of(root, index, "unet"), None
    if backend in EXPORTED:
        exported = _exported(backend, home, artifact, place, variant)
        with torch.device("meta"):  # its sizes alone are asked for
            unet = UNet(UNetConfig.from_dict(read_json(inside(home, "config.json"))))
    elif artifact is not None:
        owners = " or ".join(map(repr, EXPORTED))
        raise ArtifactError(f"an exported file ({artifact}) belongs to backend {owners}, not to {backend!r}")
    else:
        unet = load_unet(home, dtype, ops, variant=variant, allow_pickle=allow_pickle)
    vae = load_autoencoder(part_of(root, index, "vae"), dtype, wide(ops), variant=variant, allow_pickle=allow_pickle)
    texts = load_text_encoders(root, index, dtype, variant)
    nets = [controlnet] if isinstance(controlnet, str | os.PathLike) else list(controlnet)
    if not nets and (root / "controlnet").is_dir():
        nets = [root / "controlnet"]
    parts = Parts(
        unet,
        vae,
        texts,
        from_diffusers_scheduler(part_of(root, index, "scheduler")),
        tuple(load_controlnet(net, dtype, ops, variant=variant, allow_pickle=allow_pickle) for net in nets),
        unet.config.addition_embed_type is not None,
        bool(index.get("force_zeros_for_empty_prompt", False)),
        root,
        variant,
    )
    return _assembled(parts, place, dtype, backend, exported)


def read_index(root: Path) -> dict[str, Any]:
    """What a folder's ``model_index.json`` says.

    Raises:
        ArtifactError: if the folder is not one of a text-to-image model that is known here.
    """
    index = read_json(inside(root, INDEX))
    name = index.get("_class_name")
    if name not in TEXT_TO_IMAGE:
        raise ArtifactError(f"{root / INDEX}: _class_name is {shown(name)}; supported: {', '.join(TEXT_TO_IMAGE)}")
    if index.get("requires_aesthetics_score"):
        raise ArtifactError(f"{root / INDEX}: requires_aesthetics_score is true: SDXL's refiner is not supported")
    return index


def load_text_encoders(
    root: Path, index: Mapping[str, Any], dtype: torch.dtype, variant: str | None = None
) -> tuple[TextEncoder, ...]:
    """Load the text encoders that a folder's index names, with their tokenizers.

    Raises:
        ArtifactError: if one is missing, damaged or foreign.
        BackendError: if transformers is not installed.
    """
    return tuple(
        TextEncoder.load(part_of(root, index, words), part_of(root, index, encoder), dtype, variant)
        for words, encoder in TEXT_PARTS
        if index.get(encoder, [None])[0] is not None
    )


def _exported(backend: str, home: Path, artifact: Source | None, place: torch.device, variant: str | None) -> Any:
    """The UNet of a folder, exported, in another runtime."""
    given = None if artifact is None else Path(artifact)
    if backend == "onnxruntime":
        from fastdiff.backends import ort

        return ort.network_from(given or home / ort.FILE, place, home, variant)
    from fastdiff.backends import trt

    return trt.load_network(given or home / trt.FILE, place, fingerprint(home, variant))


def load_single_file(
    file: Source,
    *,
    tokenizer: Source | Sequence[Source],
    prediction_type: str | None = None,
    controlnet: Source | Sequence[Source] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    allow_pickle: bool = False,
) -> TextToImage:
    """Load one checkpoint in the original layout of Stable Diffusion 1.x, 2.x or XL.

    Args:
        file: ``.safetensors``, or a pickle if that is asked for.
        tokenizer: the folder of the tokenizer, which such files lack; SDXL takes two, or one for both.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``, where the file does not say.
        controlnet: folders of ControlNets to load beside it.
        device: where to run.
        dtype: of the networks.
        backend: of the UNet, see ``fastdiff.backends.in_memory.network_of``.
        allow_pickle: read a ``.ckpt`` with torch's weights-only reader.

    Raises:
        ArtifactError: if the file is damaged, foreign, or of another kind of model.
        BackendError: if transformers is not installed, or the device is not there.
    """
    path, (place, ops) = Path(file), _device(device)
    tensors = read_tensors(path, allow_pickle)
    facts = read_metadata(path) if path.suffix == ".safetensors" else {}
    layout = single_file.detect(tensors, facts, prediction_type)
    found = single_file.convert(tensors, layout)
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(single_file.unet_config(layout)), None, ops)
        vae = AutoencoderKL(AutoencoderKLConfig.from_dict(single_file.vae_config(layout)), wide(ops))
    for network, part in ((unet, "unet"), (vae, "vae")):
        load_strictly(network, found[part], f"{path}: {part}")
        settle(network, dtype)
    words = [tokenizer] if isinstance(tokenizer, str | os.PathLike) else list(tokenizer)
    texts = []
    for i in range(layout.text_encoders):
        name = "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
        config = single_file.text_encoder_config(layout, i)
        texts.append(text_encoder_of(words[min(i, len(words) - 1)], config, found[name], dtype))
    nets = [controlnet] if isinstance(controlnet, str | os.PathLike) else list(controlnet)
    sampler = from_diffusers_scheduler(single_file.scheduler_config(layout))
    xl = layout.family == "sdxl"
    loaded = tuple(load_controlnet(net, dtype, ops, allow_pickle=allow_pickle) for net in nets)
    return _assembled(Parts(unet, vae, tuple(texts), sampler, loaded, xl, xl), place, dtype, backend)


def load_controlnet(
    folder: Source, dtype: torch.dtype, ops: Ops = REFERENCE, *, variant: str | None = None, allow_pickle: bool = False
) -> ControlNet:
    """Load the folder of a ControlNet, as diffusers writes it, onto the CPU.

    Raises:
        ArtifactError: if anything is missing, damaged, foreign, or points out of the folder.
    """
    root = Path(folder)
    config = ControlNetConfig.from_dict(read_json(inside(root, "config.json")))
    source = find_weights(root, "diffusion_pytorch_model", variant, allow_pickle)[0]
    with torch.device("meta"):
        net = ControlNet(config, ops)
    load_strictly(net, read_tensors(source, allow_pickle), str(source))
    settle(net, dtype)
    return net


def settle(network: nn.Module, dtype: torch.dtype) -> None:
    """Make a loaded network ready to run: type, channels-last, no training."""
    network.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def part_of(root: Path, index: Mapping[str, Any], name: str) -> Path:
    """The folder of a part, which the index has to name."""
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
        raise ArtifactError(f"{root / INDEX}: {name} is {entry!r}; needed: a library and a class")
    folder = inside(root, name)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder, though {INDEX} names it")
    return folder


def _device(device: str | torch.device) -> tuple[torch.device, Ops]:
    place = checked_device(device)
    return place, ops_for(place)


def _assembled(
    parts: Parts, place: torch.device, dtype: torch.dtype, backend: str, exported: Any = None
) -> TextToImage:
    if dtype == torch.float16 and getattr(parts.vae.config, "force_upcast", False):
        parts.vae.float()
    for network in (*([] if exported else [parts.unet]), parts.vae, *parts.controlnets):
        network.to(place)
    for encoder in parts.text_encoders:
        encoder.to(place)
    return TextToImage(parts, place, backend, exported)
