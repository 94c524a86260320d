"""One UNet in diffusers and in fastdiff, with the same random weights, asked the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet
from fastdiff.models.weights import load_strictly

RELATIVE = 1e-5  # of the largest output, float32: two orders of summation


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    if got.shape != wanted.shape:
        raise AssertionError(f"{tuple(got.shape)} beside {tuple(wanted.shape)}")
    return float((got - wanted).abs().max() / wanted.abs().max())


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter off its initial value, so that a norm or bias that is left out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def pair(config: dict[str, Any]) -> tuple[nn.Module, UNet]:
    """Diffusers' network of a config, its parameters moved off their initial values, and ours with the same weights."""
    import diffusers

    theirs = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    scramble(theirs)
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(config))
    load_strictly(ours, theirs.state_dict(), "diffusers")
    return theirs, ours.eval()


def inputs(config: UNetConfig, batch: int = 2, size: tuple[int, int] = (16, 16), tokens: int = 7) -> dict[str, Tensor]:
    """Random arguments of ``UNet.forward``, all that the network reads."""
    draw = torch.Generator().manual_seed(1)
    found = {
        "sample": torch.randn(batch, config.in_channels, *size, generator=draw),
        "timestep": torch.tensor([981.0, 17.25, 0.0])[:batch],
    }
    if config.num_class_embeds:
        found["class_labels"] = torch.randint(config.num_class_embeds, (batch,), generator=draw)
    if config.conditional:
        width = config.cross_attention_dim
        found["encoder_hidden_states"] = torch.randn(
            batch, tokens, width[0] if isinstance(width, tuple) else width, generator=draw
        )
    if config.addition_embed_type:
        ids = 6 * (config.addition_time_embed_dim or 0)
        pooled = (config.projection_class_embeddings_input_dim or 0) - ids
        found["text_embeds"] = torch.randn(batch, pooled, generator=draw)
        found["time_ids"] = torch.tensor([[1024.0, 768.0, 0.0, 16.0, 512.0, 1024.0]]).repeat(batch, 1)
    if config.time_cond_proj_dim:
        found["timestep_cond"] = torch.randn(batch, config.time_cond_proj_dim, generator=draw)
    return found


def asked(theirs: nn.Module, given: dict[str, Tensor], **more: Any) -> Tensor:
    """What diffusers answers."""
    given = dict(given)
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    if added:
        more["added_cond_kwargs"] = added
    result: Tensor = theirs(given.pop("sample"), given.pop("timestep"), **given, **more).sample
    return result


@torch.no_grad()
def error(config: dict[str, Any], **how: Any) -> float:
    """Relative difference of the two on random input."""
    theirs, ours = pair(config)
    given = inputs(ours.config, **how)
    return relative_error(ours(**given), asked(theirs, given))
