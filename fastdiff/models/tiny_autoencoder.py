"""Tiny autoencoders (TAESD and its kin): two plain chains of convolutions, distilled from a full autoencoder.

They are published in two layouts. One is diffusers' ``AutoencoderTiny``: a config, and names like
``decoder.layers.3.conv.0.weight``. The other is the original: two files, whose tensors are named by their place in the
chain (``3.conv.0.weight``) and tell everything else by their shapes; ``config_of_chains`` reads those. The network
is one and keeps diffusers' names.

Source: github.com/madebyollin/taesd (MIT).
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models.autoencoder import MOST_CHANNELS
from fastdiff.models.codec import Codec
from fastdiff.models.fields import is_number, is_size, need, need_sizes, read_fields

POOL_GROUPS, POOL_WIDTH = 4, 4  # groups of the norm of a pool, and how much wider it is than its block
REACH_OF_LATENTS = 3.0  # the decoder bends what lies beyond

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU}
_FIXED = {"upsample_fn": ("nearest",), "force_upcast": (False,)}
_DERIVED = ("block_out_channels",)  # diffusers writes it and never reads it
_NAME = re.compile(r"(\d{1,3})\.((?:conv\.[024]\.)?(?:weight|bias)|pool\.[03]\.weight|pool\.1\.(?:weight|bias))")


@dataclass(frozen=True)
class AutoencoderTinyConfig:
    """The sizes of one tiny autoencoder, under diffusers' names; the last two are ours, for ``taef2``.

    A stage is what lies between two changes of size. ``encoder_pools`` and ``decoder_pools`` name for each stage
    whether its blocks begin with a pool; empty means that none does.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    encoder_pools: tuple[bool, ...] = ()
    decoder_pools: tuple[bool, ...] = ()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderTinyConfig:
        """Read a ``config.json``.

        Raises:
            ArtifactError: naming the first key whose value is unknown, damaged or not supported.
        """
        kept = {key: value for key, value in config.items() if key not in _DERIVED}
        result = read_fields(cls, kept, "AutoencoderTiny", _FIXED)
        result.check()
        return result

    def check(self) -> None:
        """Refuse sizes that cannot be built.

        Raises:
            ArtifactError: naming the first of them.
        """
        need_sizes(self, in_channels=4096, out_channels=4096, latent_channels=4096, upsampling_scaling_factor=16)
        for side in ("encoder", "decoder"):
            blocks, channels, pools = f"num_{side}_blocks", f"{side}_block_out_channels", f"{side}_pools"
            counts, widths, pooled = getattr(self, blocks), getattr(self, channels), getattr(self, pools)
            listed = isinstance(counts, tuple) and 1 <= len(counts) <= 16
            right = listed and all(count == 0 or is_size(count, 64) for count in counts)
            need(right, self, blocks, "a list of 1 to 16 whole numbers up to 64")
            right = isinstance(widths, tuple) and len(widths) == len(counts)
            # a stage takes what the one before it gives, and nothing in between changes the width
            right = right and all(is_size(width, MOST_CHANNELS) and width == widths[0] for width in widths)
            need(right, self, channels, f"{len(counts)} equal whole numbers from 1 to {MOST_CHANNELS}")
            right = isinstance(pooled, tuple) and all(isinstance(value, bool) for value in pooled)
            need(right and len(pooled) in (0, len(counts)), self, pools, f"none or {len(counts)} of true and false")
        known = isinstance(self.act_fn, str) and self.act_fn in _ACTIVATIONS
        need(known, self, "act_fn", f"one of {sorted(_ACTIVATIONS)}")
        for key in ("latent_magnitude", "scaling_factor"):
            value = getattr(self, key)
            need(is_number(value) and value > 0, self, key, "a finite number above 0")
        for key in ("latent_shift", "shift_factor"):
            need(is_number(getattr(self, key)), self, key, "a finite number")


class TinyBlock(nn.Module):
    """Three convolutions with a residual; with a pool, what the whole image holds is added to the input first."""

    def __init__(self, channels: int, act_fn: str, pool: bool):
        super().__init__()
        act, convs = _ACTIVATIONS[act_fn](), [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], act, convs[1], act, convs[2])
        wide = POOL_WIDTH * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.GroupNorm(POOL_GROUPS, wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
        ) if pool else None  # fmt: skip

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        if self.pool is not None:
            narrow, norm, act, widen = self.pool
            y = ops.group_norm_silu(narrow(x), norm.weight, norm.bias, norm.num_groups, norm.eps, silu=False)
            x = x + widen(act(y))
        return F.relu(self.conv(x) + x)  # ReLU whatever act_fn says


class Chain(nn.Module):
    """Layers one after the other, named ``layers.<place>``."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def run(self, x: Tensor, ops: Ops, part: slice) -> Tensor:
        """Apply some of the layers: ``[B, C, H, W] -> [B, C', H', W']``."""
        for layer in list(self.layers)[part]:
            x = layer(x, ops) if isinstance(layer, TinyBlock) else layer(x)
        return x

    def radius(self, part: slice, grow: int) -> int | None:
        """How many latents far a zero beside the image shows; None if a pool looks at all of it."""
        far = 0  # in pixels of the present size, of which one latent has `grow` at the end
        for layer in list(self.layers)[part]:
            if isinstance(layer, TinyBlock):
                if layer.pool is not None:
                    return None
                far += 3
            elif isinstance(layer, nn.Conv2d):
                far = far + 1 if layer.stride == (1, 1) else (far + 2) // 2
            elif isinstance(layer, nn.Upsample):
                far *= int(layer.scale_factor)  # type: ignore[arg-type]
        return math.ceil(far / grow)


class AutoencoderTiny(Codec):
    """diffusers' ``AutoencoderTiny``, and the pooled variant of ``taef2``.

    Tiles are exact, up to rounding, from an overlap of ``exact_overlap`` latents (18 for the published sizes: twice how
    far a pixel looks above the size of the latents), and this is the default. With less, a pixel near a border lacks
    part of its surrounding; blending hides the seam, not the error. A pool above the size of the latents (no published
    network has one) takes its statistics from the tile, so no overlap is exact.

    Args:
        config: the sizes.
        ops: the kernels to use; ``fastdiff.kernels.REFERENCE`` is plain torch.
    """

    def __init__(self, config: AutoencoderTinyConfig, ops: Ops = REFERENCE):
        super().__init__()
        self.config, self.ops = config, ops
        self.in_channels, self.latent_channels = config.in_channels, config.latent_channels
        self.shrink = 2 ** (len(config.num_encoder_blocks) - 1)
        self.grow = config.upsampling_scaling_factor ** (len(config.num_decoder_blocks) - 1)
        self.scaling_factor, self.shift, self.spread = config.scaling_factor, (config.shift_factor,), (1.0,)
        self.encoder, self.decoder = Chain(_encoder_layers(config)), Chain(_decoder_layers(config))
        # where the chains reach the size of the latents, and leave it
        strided = [i for i, layer in enumerate(self.encoder.layers) if getattr(layer, "stride", None) == (2, 2)]
        enlarged = [i for i, layer in enumerate(self.decoder.layers) if isinstance(layer, nn.Upsample)]
        reached, left = max(strided, default=-1) + 1, min(enlarged, default=len(self.decoder.layers))
        self._shrinking, self._finishing = slice(0, reached), slice(reached, None)
        self._beginning, self._growing = slice(0, left), slice(left, None)
        self.encode_radius = self.encoder.radius(self._shrinking, 1)
        self.decode_radius = self.decoder.radius(self._growing, self.grow)

    def encode(self, images: Tensor) -> Tensor:
        """``images [B, 3, H, W]`` in [-1, 1] -> raw latents ``[B, C, h, w]``, mostly inside the ``latent_magnitude``.

        Raises:
            ShapeError: if the images do not fit, or H or W is no multiple of ``shrink``.
        """
        return self._encode(images)

    def encode_tiled(self, images: Tensor, tile: int = 64, overlap: int | None = None) -> Tensor:
        """Encode tile by tile; ``tile`` and ``overlap`` count latents, as in ``decode_tiled``."""
        return self._encode_in_tiles(images, tile, overlap)

    def to_latents(self, images: Tensor) -> Tensor:
        """``images [B, 3, H, W]`` in [-1, 1] -> ``[B, C, h, w]`` as a diffusion network sees them."""
        return self.normalise(self.encode(images))

    def scale_latents(self, raw: Tensor) -> Tensor:
        """Raw latents -> [0, 1], what lies beyond the ``latent_magnitude`` is clamped; for storage as an image."""
        return (raw / (2 * self.config.latent_magnitude) + self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, stored: Tensor) -> Tensor:
        """[0, 1] -> raw latents."""
        return (stored - self.config.latent_shift) * (2 * self.config.latent_magnitude)

    def forward(self, images: Tensor) -> Tensor:
        """Round trip of ``images [B, 3, H, W]`` through latents of 8 bits, as diffusers does it."""
        stored = (self.scale_latents(self.encode(images)) * 255).round() / 255
        return self.decode(self.unscale_latents(stored))

    def _encode_tile(self, images: Tensor) -> Tensor:
        # the chains know images from 0 to 1
        x = ((images + 1) / 2).contiguous(memory_format=torch.channels_last)
        return self.encoder.run(x, self.ops, self._shrinking)

    def _encode_whole(self, x: Tensor) -> Tensor:
        return self.encoder.run(x.contiguous(memory_format=torch.channels_last), self.ops, self._finishing)

    def _decode_whole(self, latents: Tensor) -> Tensor:
        bent = torch.tanh(latents / REACH_OF_LATENTS) * REACH_OF_LATENTS
        return self.decoder.run(bent.contiguous(memory_format=torch.channels_last), self.ops, self._beginning)

    def _decode_tile(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.decoder.run(x, self.ops, self._growing) * 2 - 1


def _blocks(count: int, channels: int, act_fn: str, pools: tuple[bool, ...], stage: int) -> list[nn.Module]:
    return [TinyBlock(channels, act_fn, bool(pools) and pools[stage]) for _ in range(count)]


def _encoder_layers(config: AutoencoderTinyConfig) -> list[nn.Module]:
    wide, layers = config.encoder_block_out_channels[0], list[nn.Module]()
    for stage, count in enumerate(config.num_encoder_blocks):
        first = nn.Conv2d(config.in_channels, wide, 3, padding=1)
        layers.append(nn.Conv2d(wide, wide, 3, stride=2, padding=1, bias=False) if stage else first)
        layers += _blocks(count, wide, config.act_fn, config.encoder_pools, stage)
    return [*layers, nn.Conv2d(wide, config.latent_channels, 3, padding=1)]


def _decoder_layers(config: AutoencoderTinyConfig) -> list[nn.Module]:
    wide = config.decoder_block_out_channels[0]
    layers = [nn.Conv2d(config.latent_channels, wide, 3, padding=1), _ACTIVATIONS[config.act_fn]()]
    for stage, count in enumerate(config.num_decoder_blocks):
        if stage:
            layers.append(nn.Upsample(scale_factor=config.upsampling_scaling_factor, mode="nearest"))
            layers.append(nn.Conv2d(wide, wide, 3, padding=1, bias=False))
        layers += _blocks(count, wide, config.act_fn, config.decoder_pools, stage)
    return [*layers, nn.Conv2d(wide, config.out_channels, 3, padding=1)]


class _Sizes(NamedTuple):
    """What the tensors of one chain tell."""

    inputs: int
    width: int
    outputs: int
    blocks: tuple[int, ...]
    pools: tuple[bool, ...]


# The layers of a chain in order, as states: from each, which kind of layer may follow and what it leads to. "nothing"
# is a place without tensors: the bend at the start of a decoder, an activation, an upsampling.
_ENCODER = {
    "start": {"conv": "stage"},
    "stage": {"block": "stage", "pooled block": "stage", "conv without bias": "stage", "conv": "end"},
    "end": {},
}
_DECODER = {
    "start": {"nothing": "bent"},
    "bent": {"conv": "first"},
    "first": {"nothing": "stage"},
    "stage": {"block": "stage", "pooled block": "stage", "nothing": "enlarged", "conv": "end"},
    "enlarged": {"conv without bias": "stage"},
    "end": {},
}


def config_of_chains(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], source: str = "tiny autoencoder"
) -> AutoencoderTinyConfig:
    """Find out the sizes of an autoencoder in the original layout.

    Args:
        encoder: tensors by place, such as ``1.conv.0.weight``.
        decoder: likewise; its place 0 is the bend, which has no tensors.
        source: named in errors.

    Raises:
        ArtifactError: naming the first tensor that has no place in such a chain.
    """
    left, right = (
        _read_chain(encoder, _ENCODER, f"{source}: encoder"),
        _read_chain(decoder, _DECODER, f"{source}: decoder"),
    )
    if left.outputs != right.inputs:
        raise ArtifactError(f"{source}: the encoder gives {left.outputs} channels, the decoder takes {right.inputs}")
    config = AutoencoderTinyConfig(
        in_channels=left.inputs,
        out_channels=right.outputs,
        encoder_block_out_channels=(left.width,) * len(left.blocks),
        decoder_block_out_channels=(right.width,) * len(right.blocks),
        latent_channels=left.outputs,
        num_encoder_blocks=left.blocks,
        num_decoder_blocks=right.blocks,
        encoder_pools=left.pools if any(left.pools) else (),
        decoder_pools=right.pools if any(right.pools) else (),
    )
    config.check()
    return config


def chain_views(network: AutoencoderTiny) -> tuple[nn.Module, nn.Module]:
    """The encoder and decoder of a network under the names of the original layout; the parameters are shared."""
    encoder, decoder = network.encoder.layers, network.decoder.layers
    shifted = OrderedDict((str(place + 1), layer) for place, layer in enumerate(decoder))
    return nn.Sequential(*encoder), nn.Sequential(shifted)


def _read_chain(tensors: Mapping[str, Tensor], states: dict[str, dict[str, str]], source: str) -> _Sizes:
    parts: dict[int, set[str]] = {}
    for name in tensors:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ArtifactError(f"{source}: tensor {name!r} does not belong to a chain such as '1.conv.0.weight'")
        parts.setdefault(int(found[1]), set()).add(found[2])
    state, blocks, pools, convs = "start", list[int](), list[set[bool]](), list[int]()
    for place in range(max(parts, default=0) + 1):
        kind = _kind(parts.get(place, set()))
        if kind not in states[state]:
            allowed = " or ".join(states[state]) or "the end"
            names = sorted(f"{place}.{part}" for part in parts.get(place, ()))
            raise ArtifactError(f"{source}: layer {place} is {kind} {names}; allowed here: {allowed}")
        state = states[state][kind]
        if "conv" in kind:
            convs.append(place)
            blocks.append(0)
            pools.append(set())
        elif "block" in kind:
            blocks[-1] += 1
            pools[-1].add(kind == "pooled block")
            if len(pools[-1]) > 1:
                raise ArtifactError(f"{source}: layer {place} is {kind}; allowed are stages with all pools or none")
    if state != "end":
        raise ArtifactError(f"{source}: the layers stop after {len(parts)}; the last must be a conv with bias")
    first, last = (_conv_sizes(tensors, f"{place}.weight", source) for place in (convs[0], convs[-1]))
    # the last convolution opened a stage of its own, which does not count
    return _Sizes(first[1], first[0], last[0], tuple(blocks[:-1]), tuple(True in some for some in pools[:-1]))


def _kind(parts: set[str]) -> str:
    if any(part.startswith("pool.") for part in parts):
        return "pooled block"
    if any(part.startswith("conv.") for part in parts):
        return "block"
    if not parts:
        return "nothing"
    return "conv" if "bias" in parts else "conv without bias"


def _conv_sizes(tensors: Mapping[str, Tensor], name: str, source: str) -> tuple[int, int]:
    """Channels out and in of a convolution; the rest of its shape is checked when it is loaded."""
    shape = list(tensors[name].shape) if name in tensors else []
    if len(shape) != 4:
        raise ArtifactError(f"{source}: {name!r} is {shape or 'missing'}; needed: the weight of a convolution")
    return shape[0], shape[1]
