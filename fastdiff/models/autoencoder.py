"""The autoencoder of latent diffusion (Stable Diffusion, SDXL, SD3, Flux): images to latents and back.

Parameter names are those of diffusers' ``AutoencoderKL``, so published files load as they are; the oldest of them
name the attention differently, see ``rename_old_attention``.

Source: Rombach et al. 2021, arXiv:2112.10752, sec. 3.1 and appendix G.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError, ShapeError
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models.codec import Codec
from fastdiff.models.fields import is_number, is_size, need, need_sizes, read_fields
from fastdiff.models.unet import Downsample, Upsample

EPS = 1e-6  # of every norm; no config says it
LOG_VARIANCE = (-30.0, 20.0)  # what a damaged latent may not exceed
MOST_CHANNELS = 65536

_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The sizes of one autoencoder, under diffusers' names. ``from_dict`` refuses what it cannot honour.

    ``force_upcast`` is a warning and changes nothing here: float16 overflows in these weights, float32 and bfloat16 do
    not.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Read a ``config.json``.

        Raises:
            ArtifactError: naming the first key whose value is unknown, damaged or not supported.
        """
        result = read_fields(cls, config, "AutoencoderKL", {"act_fn": ("silu", "swish")})
        result._check()
        return result

    def _check(self) -> None:
        need_sizes(self, in_channels=4096, out_channels=4096, latent_channels=4096, layers_per_block=64)
        need_sizes(self, norm_num_groups=4096, sample_size=16384)
        channels, groups = self.block_out_channels, self.norm_num_groups
        listed = isinstance(channels, tuple) and 1 <= len(channels) <= 16
        need(listed, self, "block_out_channels", "a list of 1 to 16 sizes")
        fits = all(is_size(value, MOST_CHANNELS) and value % groups == 0 for value in channels)
        need(fits, self, "block_out_channels", f"multiples of norm_num_groups={groups} up to {MOST_CHANNELS}")
        for key, table in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            types = getattr(self, key)
            right = isinstance(types, tuple) and len(types) == len(channels)
            right = right and all(isinstance(kind, str) and kind in table for kind in types)
            need(right, self, key, f"{len(channels)} of {sorted(table)}")
        for key in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            need(isinstance(getattr(self, key), bool), self, key, "true or false")
        self._check_scale()

    def _check_scale(self) -> None:
        scale, shift, mean, std = self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std
        need(is_number(scale) and scale > 0, self, "scaling_factor", "a finite number above 0")
        need(shift is None or is_number(shift), self, "shift_factor", "null or a finite number")
        for key, values in (("latents_mean", mean), ("latents_std", std)):
            right = isinstance(values, tuple) and len(values) == self.latent_channels and all(map(is_number, values))
            need(values is None or right, self, key, f"null or {self.latent_channels} finite numbers")
        need(std is None or min(std) > 0, self, "latents_std", "numbers above 0")
        need((mean is None) == (std is None), self, "latents_mean", "null or numbers, as latents_std")
        # pipelines that know one of these ignore the other, so together they would mean two things
        need(mean is None or not shift, self, "shift_factor", "null where latents_mean is given")


class Moments(NamedTuple):
    """The distribution of the latents of a batch: a Gaussian per number, ``mean`` and ``logvar`` ``[B, C, h, w]``."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """``[B, C, h, w]``."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents, ``[B, C, h, w]``."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Draw latents ``[B, C, h, w]`` with standard normal ``noise`` of the same shape."""
        if noise.shape != self.mean.shape:
            raise ShapeError(f"noise is {list(noise.shape)}; needed: {list(self.mean.shape)}")
        return self.mean + self.std * noise


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the (projected) input."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C', H, W]``."""
        h = self.conv1(_norm_silu(self.norm1, x, ops))
        h = self.conv2(_norm_silu(self.norm2, h, ops))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over the pixels: one head as wide as the channels, and a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, as published: `to_out.0`

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        batch, channels, height, width = x.shape
        tokens = _norm_silu(self.group_norm, x, ops, silu=False).permute(0, 2, 3, 1)
        tokens = tokens.reshape(batch, 1, height * width, channels)
        mixed = ops.attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](mixed).view(batch, height, width, channels).permute(0, 3, 1, 2)


class Level(nn.Module):
    """One resolution: ResNet blocks, attention after each where the config asks for it, then a resampling."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, attend: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(outputs if i else inputs, outputs, groups) for i in range(layers))
        self.attentions = nn.ModuleList(Attention(outputs, groups) for _ in range(layers)) if attend else None
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C', H', W']``."""
        return self.resample(self.same_size(x, ops), ops)

    def same_size(self, x: Tensor, ops: Ops) -> Tensor:
        """All but the resampling: ``[B, C, H, W] -> [B, C', H, W]``."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, ops)
            if self.attentions is not None:
                x = self.attentions[i](x, ops)
        return x

    def resample(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C', H, W] -> [B, C', H', W']``."""
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, (2 * x.shape[2], 2 * x.shape[3]), ops)
        return x


class Middle(nn.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, channels: int, groups: int, attend: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)]) if attend else None

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        x = self.resnets[0](x, ops)
        if self.attentions is not None:
            x = self.attentions[0](x, ops)
        return self.resnets[1](x, ops)


class Encoder(nn.Module):
    """``[B, 3, H, W] -> [B, 2 C, h, w]``: mean and log variance side by side."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            level = Level(channels[max(i - 1, 0)], channels[i], config.layers_per_block, groups, _DOWN[kind])
            if i < len(channels) - 1:
                level.downsamplers = nn.ModuleList([Downsample(channels[i], 0)])
            self.down_blocks.append(level)
        self.mid_block = Middle(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def shrink(self, x: Tensor, ops: Ops) -> Tensor:
        """All that is larger than the latents: ``[B, 3, H, W] -> [B, C', h, w]``."""
        x = self.conv_in(x)
        for level in self.down_blocks[:-1]:
            x = level(x, ops)
        return x

    def finish(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C', h, w] -> [B, 2 C, h, w]``."""
        x = self.mid_block(self.down_blocks[-1](x, ops), ops)
        return self.conv_out(_norm_silu(self.conv_norm_out, x, ops))


class Decoder(nn.Module):
    """``[B, C, h, w] -> [B, 3, H, W]``."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            level = Level(channels[max(i - 1, 0)], channels[i], config.layers_per_block + 1, groups, _UP[kind])
            if i < len(channels) - 1:
                level.upsamplers = nn.ModuleList([Upsample(channels[i])])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def begin(self, x: Tensor, ops: Ops) -> Tensor:
        """All that is of the latents' size: ``[B, C, h, w] -> [B, C', h, w]``."""
        return cast(Level, self.up_blocks[0]).same_size(self.mid_block(self.conv_in(x), ops), ops)

    def grow(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C', h, w] -> [B, 3, H, W]``."""
        x = cast(Level, self.up_blocks[0]).resample(x, ops)
        for level in self.up_blocks[1:]:
            x = level(x, ops)
        return self.conv_out(_norm_silu(self.conv_norm_out, x, ops))


class AutoencoderKL(Codec):
    """diffusers' ``AutoencoderKL``.

    Tiles are never exact here. What is of the latents' size, the attention of the middle with it, still sees the whole
    image; but the norms at larger sizes take their statistics from the whole image too, and a tile knows only itself.
    Blending hides the seams, not the error; ``tests/test_autoencoder.py`` holds it below that of diffusers' tiles, on
    random weights. The work of the attention grows with the square of the number of latents.

    Args:
        config: the sizes.
        ops: the kernels to use; ``fastdiff.kernels.REFERENCE`` is plain torch. Its attention must take heads as wide
            as the last of ``block_out_channels`` (512 in published networks).
    """

    encode_radius = decode_radius = None

    def __init__(self, config: AutoencoderKLConfig, ops: Ops = REFERENCE):
        super().__init__()
        self.config, self.ops = config, ops
        self.in_channels, self.latent_channels = config.in_channels, config.latent_channels
        self.shrink = self.grow = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor = config.scaling_factor
        self.shift = config.latents_mean or (config.shift_factor or 0.0,)
        self.spread = config.latents_std or (1.0,)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latents = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else None

    def encode(self, images: Tensor) -> Moments:
        """``images [B, 3, H, W]`` in [-1, 1] -> moments ``[B, C, h, w]``.

        Raises:
            ShapeError: if the images do not fit, or H or W is no multiple of ``shrink``.
        """
        return self._moments(self._encode(images))

    def encode_tiled(self, images: Tensor, tile: int = 64, overlap: int | None = None) -> Moments:
        """Encode tile by tile; ``tile`` and ``overlap`` count latents, as in ``decode_tiled``."""
        return self._moments(self._encode_in_tiles(images, tile, overlap))

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """``images [B, 3, H, W]`` in [-1, 1] -> ``[B, C, h, w]`` as a diffusion network sees them.

        Args:
            images: as for ``encode``.
            noise: standard normal, ``[B, C, h, w]``, to draw from the moments; None takes the mode.
        """
        moments = self.encode(images)
        return self.normalise(moments.mode() if noise is None else moments.sample(noise))

    def forward(self, images: Tensor) -> Tensor:
        """Round trip of ``images [B, 3, H, W]``, without scaling."""
        return self.decode(self.encode(images).mode())

    def _encode_tile(self, images: Tensor) -> Tensor:
        return self.encoder.shrink(images.contiguous(memory_format=torch.channels_last), self.ops)

    def _encode_whole(self, x: Tensor) -> Tensor:
        x = self.encoder.finish(x.contiguous(memory_format=torch.channels_last), self.ops)
        return x if self.quant_conv is None else self.quant_conv(x)

    def _decode_whole(self, latents: Tensor) -> Tensor:
        x = latents.contiguous(memory_format=torch.channels_last)
        return self.decoder.begin(x if self.post_quant_conv is None else self.post_quant_conv(x), self.ops)

    def _decode_tile(self, x: Tensor) -> Tensor:
        return self.decoder.grow(x.contiguous(memory_format=torch.channels_last), self.ops)

    @staticmethod
    def _moments(both: Tensor) -> Moments:
        mean, logvar = both.chunk(2, dim=1)
        return Moments(mean, logvar.clamp(*LOG_VARIANCE))


def wide(ops: Ops) -> Ops:
    """Ops for an autoencoder, whose one attention has heads too wide for the fused kernel."""
    return ops._replace(attention=REFERENCE.attention)


def rename_old_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the attention of early files (``query``, ``key``, ``value``, ``proj_attn``) its present names.

    Names that are already present stay as they are.

    Raises:
        ArtifactError: if a file holds the same tensor under both names.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, _, last = name.rpartition(".")
        parent, _, part = head.rpartition(".")
        if ".attentions." in f".{parent}." and part in _OLD_ATTENTION:
            name = f"{parent}.{_OLD_ATTENTION[part]}.{last}"
        if name in renamed or (name != f"{head}.{last}" and name in tensors):
            raise ArtifactError(f"tensor {name!r} is there twice, under its old name and its present one")
        renamed[name] = tensor
    return renamed


def _norm_silu(norm: nn.GroupNorm, x: Tensor, ops: Ops, silu: bool = True) -> Tensor:
    return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu)
