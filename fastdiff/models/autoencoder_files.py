"""Autoencoders from files: strict and safe, like every model folder (see ``weights``)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models.autoencoder import AutoencoderKL, AutoencoderKLConfig, rename_old_attention
from fastdiff.models.files import find_weights, inside, read_json, read_tensors
from fastdiff.models.tiny_autoencoder import AutoencoderTiny, AutoencoderTinyConfig, chain_views, config_of_chains
from fastdiff.models.weights import CONFIG, STEM, load_strictly


def load_autoencoder(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    ops: Ops = REFERENCE,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> AutoencoderKL | AutoencoderTiny:
    """Load the folder of an autoencoder, as diffusers writes it, onto the CPU.

    Args:
        folder: holds ``config.json`` and the weights, whole or in shards.
        dtype: of the parameters in memory.
        ops: the kernels to use.
        variant: which of several weights, such as ``"fp16"``; see ``find_weights``.
        allow_pickle: read pickled weights where there are no safetensors, with torch's weights-only reader.

    Raises:
        ArtifactError: if anything is missing, damaged, foreign, or points out of the folder.
    """
    root = Path(folder)
    config = read_json(inside(root, CONFIG))
    network: AutoencoderKL | AutoencoderTiny
    with torch.device("meta"):
        if config.get("_class_name") == "AutoencoderTiny":
            network = AutoencoderTiny(AutoencoderTinyConfig.from_dict(config), ops)
        else:
            network = AutoencoderKL(AutoencoderKLConfig.from_dict(config), ops)
    source = find_weights(root, STEM, variant, allow_pickle)[0]
    tensors = read_tensors(source, allow_pickle)
    if isinstance(network, AutoencoderKL):
        tensors = rename_old_attention(tensors)
    load_strictly(network, tensors, str(source))
    _settle(network, dtype)
    return network


def load_tiny_chains(
    encoder: str | os.PathLike[str],
    decoder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    ops: Ops = REFERENCE,
) -> AutoencoderTiny:
    """Load a tiny autoencoder of the original layout (TAESD and its kin) onto the CPU.

    Args:
        encoder: a safetensors file, named by place, such as ``1.conv.0.weight``.
        decoder: likewise.
        dtype: of the parameters in memory.
        ops: the kernels to use.

    Raises:
        ArtifactError: if a file is missing, damaged, or not such a chain.
    """
    left, right = read_tensors(Path(encoder)), read_tensors(Path(decoder))
    with torch.device("meta"):
        network = AutoencoderTiny(config_of_chains(left, right, f"{encoder}, {decoder}"), ops)
    views = chain_views(network)
    for view, tensors, source in zip(views, (left, right), (encoder, decoder), strict=True):
        load_strictly(view, tensors, str(source))  # in the file's own names
    _settle(network, dtype)
    return network


def _settle(network: nn.Module, dtype: torch.dtype) -> None:
    network.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
