"""Inputs as a network meets them on its way: noise plus scaled data, at times spread over the whole path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.export.networks import embedded, tokens_width
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import Encoder, UNet
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import Prediction

WORDS = 77  # tokens of CLIP's prompts
MOST_SIDE = 32  # float64 attention over the pixels of larger latents takes gigabytes
Inputs = dict[str, Tensor]


def conditioning(unet: Encoder, batch: int, seed: int) -> Inputs:
    """Labels, tokens, pooled text and sizes for ``batch`` images, under the names of the graphs' inputs.

    Tokens are normal: text encoders end with a norm.
    """
    draw, config = torch.Generator().manual_seed(seed), unet.config
    found: Inputs = {}
    if config.num_class_embeds:
        found["class_labels"] = torch.randint(0, config.num_class_embeds, (batch,), generator=draw)
    if config.conditional:
        found["encoder_hidden_states"] = torch.randn(batch, WORDS, tokens_width(config), generator=draw)
    for name, given in embedded(unet).items():
        if name == "time_ids":
            side = 8.0 * (config.sample_size or 64)
            found[name] = torch.tensor([[side, side, 0, 0, side, side]]).repeat(batch, 1)
        elif name in ("text_embeds", "timestep_cond"):
            found[name] = torch.randn(batch, *map(int, given.shape), generator=draw)  # type: ignore[arg-type]
    return found


@torch.no_grad()
def on_the_way(
    unet: UNet, path: Path, prediction: Prediction, batch: int, size: Sequence[int], seed: int = 0
) -> Inputs:
    """Inputs of one evaluation, for as many images as ``batch``, each at another time of the path.

    The data is what the network itself makes of noise at the middle of the path, brought to a spread of at most 1.
    """
    config, draw = unet.config, torch.Generator().manual_seed(seed)
    channels = config.out_channels if config.out_channels <= config.in_channels else config.in_channels
    noise = torch.randn(batch, channels, *size, generator=draw)
    rest = torch.randn(batch, config.in_channels - channels, *size, generator=draw)
    told = conditioning(unet, batch, seed)
    span = path.t_start - path.t_end

    def at(data: Tensor, shares: Sequence[float]) -> tuple[Tensor, Inputs]:
        levels = [path.t_end + span * share for share in shares]
        ways = [prediction.coefficients(path, t, path.t_end + (t - path.t_end) / 2) for t in levels]
        columns = [torch.tensor(c).view(-1, 1, 1, 1) for c in zip(*map(path.alpha_sigma, levels), strict=True)]
        x = columns[0] * data + columns[1] * noise
        scaled = x * torch.tensor([way.c_in for way in ways]).view(-1, 1, 1, 1)
        inputs = {"sample": torch.cat([scaled, rest], 1), "timestep": torch.tensor([way.c_noise for way in ways])}
        if unet.target is not None:
            inputs["target"] = torch.tensor([way.c_noise_to for way in ways])
        return x, inputs | told

    x, inputs = at(torch.zeros_like(noise), [0.6] * batch)
    t = path.t_end + span * 0.6
    way = prediction.coefficients(path, t, path.t_end + span * 0.3)
    data = way.c_skip * x + way.c_out * unet(**inputs)[:, :channels]
    data = data / data.std().clamp_min(1.0)
    return at(data, [0.9 - 0.8 * i / max(batch - 1, 1) for i in range(batch)])[1]


def side_of(config: UNetConfig) -> int:
    """Height and width of what a network is measured at: what it was trained on, or less where that takes minutes."""
    return min(config.sample_size or MOST_SIDE, MOST_SIDE)
