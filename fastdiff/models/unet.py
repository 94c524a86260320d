"""The UNet of the field: ResNet blocks, attention, class and two-time conditioning, driven by its published config.

Parameter names are those of diffusers' ``UNet2DModel``, so published files load as they are. The forward pass is split
where work stops depending on the image: ``embed`` and ``time_rows`` depend on times and labels alone and are computed
once for a whole step table; ``trunk`` is what runs at every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.kernels import REFERENCE, Ops

_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True}
# What the config may say only in one way: anything else would change the arithmetic, so it is refused by name.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1, 1.0),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "num_train_timesteps": (None, 1000),
}


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of one UNet, under diffusers' names. ``from_dict`` refuses what it cannot honour."""

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    layers_per_block: int = 2
    time_embedding_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    attention_head_dim: int | None = 8
    add_attention: bool = True
    attn_norm_num_groups: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    num_class_embeds: int | None = None
    downsample_padding: int = 1
    dropout: float = 0.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a ``config.json``.

        Raises:
            ArtifactError: naming the first key whose value is unknown, damaged or not supported.
        """
        name = config.get("_class_name", "UNet2DModel")
        if name != "UNet2DModel":
            raise ArtifactError(f"config.json: _class_name is {name!r}; supported is 'UNet2DModel'")
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if key in known:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif key in _FIXED:
                if value not in _FIXED[key]:
                    raise ArtifactError(f"config.json: {key} is {value!r}; supported: {_FIXED[key]}")
            elif not key.startswith("_"):
                raise ArtifactError(f"config.json: unknown key {key!r} (value {value!r})")
        result = cls(**values)
        result._check()
        return result

    def _check(self) -> None:
        def need(condition: bool, key: str, allowed: str) -> None:
            if not condition:
                raise ArtifactError(f"config.json: {key} is {getattr(self, key)!r}; allowed: {allowed}")

        def is_size(value: Any, most: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

        for key, most in (("sample_size", 16384), ("in_channels", 4096), ("out_channels", 4096)):
            need(is_size(getattr(self, key), most), key, f"a whole number from 1 to {most}")
        for key, most in (("layers_per_block", 64), ("norm_num_groups", 4096)):
            need(is_size(getattr(self, key), most), key, f"a whole number from 1 to {most}")
        for key in ("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds"):
            value = getattr(self, key)
            need(value is None or is_size(value, 1_000_000), key, "null or a whole number from 1 to 1000000")
        channels = self.block_out_channels
        need(
            isinstance(channels, tuple) and 1 <= len(channels) <= 16,
            "block_out_channels",
            "a list of 1 to 16 sizes",
        )
        for value in channels:
            fits = is_size(value, 65536) and value % self.norm_num_groups == 0
            need(fits, "block_out_channels", f"multiples of norm_num_groups={self.norm_num_groups} up to 65536")
            head = self.attention_head_dim or value
            need(value % min(head, value) == 0, "attention_head_dim", "a divisor of every block's channels")
        for key, table in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            types = getattr(self, key)
            right = isinstance(types, tuple) and len(types) == len(channels)
            right = right and all(isinstance(t, str) and t in table for t in types)
            need(right, key, f"{len(channels)} of {sorted(table)}")
        groups = self.attn_norm_num_groups
        need(groups is None or channels[-1] % groups == 0, "attn_norm_num_groups", f"a divisor of {channels[-1]}")
        for key in ("flip_sin_to_cos", "add_attention"):
            need(isinstance(getattr(self, key), bool), key, "true or false")
        need(self.resnet_time_scale_shift in ("default", "scale_shift"), "resnet_time_scale_shift",
             "'default' or 'scale_shift'")  # fmt: skip
        need(self.downsample_padding in (0, 1), "downsample_padding", "0 or 1")
        need(isinstance(self.norm_eps, float) and 0 < self.norm_eps < 1, "norm_eps", "a number inside (0, 1)")
        need(self.freq_shift in (0, 1), "freq_shift", "0 or 1")

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


@dataclass(frozen=True)
class TargetConfig:
    """The extra embedding that makes a one-time network a flow map: a function of the interval ``t - s``.

    ``scale`` multiplies the interval (in timesteps); with ``max_period`` it sets the frequencies. They stay low, so
    that the derivative with respect to the target time, which self-distillation needs, stays small.
    """

    channels: int = 32
    scale: float = 0.032
    max_period: float = 100.0


def sinusoid(values: Tensor, dim: int, *, flip: bool = True, shift: float = 0, max_period: float = 10000.0) -> Tensor:
    """Sine-cosine features. ``values [B]`` -> ``[B, dim]`` float32. Source: Vaswani et al. 2017, sec. 3.5."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * steps / (half - shift))[None, :]
    features = [angles.cos(), angles.sin()] if flip else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(features, dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them: ``[B, in] -> [B, out]``."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, time modulation, norm, SiLU, conv, plus the (projected) input."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.groups, self.eps = config.norm_num_groups, config.norm_eps
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(self.groups, in_channels, self.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.rows = out_channels * (2 if self.scale_shift else 1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, self.rows)
        self.norm2 = nn.GroupNorm(self.groups, out_channels, self.eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time_row: Tensor, ops: Ops) -> Tensor:
        """``x [B, C, H, W]``, ``time_row [B, rows]`` (this block's slice of ``time_rows``) -> ``[B, C', H, W]``."""
        h = self.conv1(ops.group_norm_silu(x, self.norm1.weight, self.norm1.bias, self.groups, self.eps))
        scale = shift = None
        if self.scale_shift:
            scale, shift = time_row.chunk(2, dim=1)
        else:
            h = h + time_row[:, :, None, None]
        norm = self.norm2
        h = self.conv2(ops.group_norm_silu(h, norm.weight, norm.bias, self.groups, self.eps, scale=scale, shift=shift))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual."""

    def __init__(self, config: UNetConfig, channels: int, groups: int | None):
        super().__init__()
        self.heads = channels // min(config.attention_head_dim or channels, channels)
        self.eps, self.groups = config.norm_eps, groups
        self.group_norm = nn.GroupNorm(groups, channels, self.eps) if groups else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, as published: `to_out.0`

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        batch, channels, height, width = x.shape
        y = x
        if self.group_norm is not None:
            norm = self.group_norm
            y = ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, self.eps, silu=False)
        tokens = y.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        q, k, v = (
            project(tokens).view(batch, height * width, self.heads, -1).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = ops.attention(q, k, v).transpose(1, 2).reshape(batch, height * width, channels)
        out = self.to_out[0](mixed).view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + out


class Downsample(nn.Module):
    """Stride-2 convolution."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H/2, W/2]``."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, 2H, 2W]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One resolution: ResNet blocks, attention after each where the config asks for it, then a resampling."""

    def __init__(self, config: UNetConfig, sizes: list[tuple[int, int]], attend: bool, groups: int | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(config, a, b) for a, b in sizes)
        self.attentions = nn.ModuleList(Attention(config, b, groups) for _, b in sizes) if attend else None


class UNet(nn.Module):
    """diffusers' ``UNet2DModel``, with an optional second time.

    Args:
        config: the sizes.
        target: makes the network a flow map; its tensors, ``target_embedding.*``, live in a file of their own.
        ops: the kernels to use; ``fastdiff.kernels.REFERENCE`` is plain torch.
    """

    def __init__(self, config: UNetConfig, target: TargetConfig | None = None, ops: Ops = REFERENCE):
        super().__init__()
        self.config, self.target, self.ops = config, target, ops
        channels, wide = config.block_out_channels, config.embedding_dim
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], wide)
        labels = config.num_class_embeds
        self.class_embedding = nn.Embedding(labels, wide) if labels else None
        self.target_embedding = TimestepEmbedding(target.channels, wide) if target else None
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, last = [channels[0]], channels[0]
        for level, kind in enumerate(config.down_block_types):
            out = channels[level]
            sizes = [(last if i == 0 else out, out) for i in range(config.layers_per_block)]
            block = Block(config, sizes, _DOWN[kind], groups)
            skips += [out] * config.layers_per_block
            if level < len(channels) - 1:
                block.downsamplers = nn.ModuleList([Downsample(out, config.downsample_padding)])
                skips.append(out)
            self.down_blocks.append(block)
            last = out
        # diffusers drops the norm of the middle attention under scale_shift unless the config names its groups
        middle = config.attn_norm_num_groups or (groups if config.resnet_time_scale_shift == "default" else None)
        self.mid_block = Block(config, [(last, last), (last, last)], False, None)
        if config.add_attention:
            self.mid_block.attentions = nn.ModuleList([Attention(config, last, middle)])
        for level, kind in enumerate(config.up_block_types):
            out = channels[-1 - level]
            sizes = []
            for _ in range(config.layers_per_block + 1):
                sizes.append((last + skips.pop(), out))
                last = out
            block = Block(config, sizes, _UP[kind], groups)
            if level < len(channels) - 1:
                block.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def embed(self, timestep: Tensor, class_labels: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Embed times and labels.

        Args:
            timestep: ``[B]``, in the units of training (``Path.timestep``).
            class_labels: ``[B]`` int64, or None for a network without classes.
            target: ``[B]``, where a flow map is to land, in the units of ``timestep``. None, or equal to ``timestep``,
                gives exactly the one-time network.

        Returns:
            ``[B, embedding_dim]``.
        """
        config = self.config
        dtype = self.time_embedding.linear_1.weight.dtype
        features = sinusoid(
            timestep, config.block_out_channels[0], flip=config.flip_sin_to_cos, shift=config.freq_shift
        )
        embedding = self.time_embedding(features.to(dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        if self.target_embedding is not None and target is not None:
            embedding = embedding + self._interval(timestep - target).to(dtype)
        return embedding

    def _interval(self, interval: Tensor) -> Tensor:
        """The second time's embedding, less its value at interval 0, so that the diagonal is exact."""
        assert self.target is not None and self.target_embedding is not None
        both = torch.cat([interval, torch.zeros_like(interval[:1])]) * self.target.scale
        features = sinusoid(both, self.target.channels, max_period=self.target.max_period)
        values = self.target_embedding(features.to(self.target_embedding.linear_1.weight.dtype))
        # where, not the difference alone: a batched product may round the same row differently in two places
        return torch.where(interval[:, None] == 0, 0, values[:-1] - values[-1:])

    def time_rows(self, embedding: Tensor) -> Tensor:
        """Project an embedding ``[B, E]`` for every ResNet block: ``[B, P]``, their rows side by side."""
        activated = F.silu(embedding)
        return torch.cat([resnet.time_emb_proj(activated) for resnet in self._resnets()], dim=1)

    def _resnets(self) -> list[ResnetBlock]:
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [resnet for block in blocks for resnet in block.resnets]

    def trunk(self, x: Tensor, time_rows: Tensor) -> Tensor:
        """The part that runs at every step: ``x [B, C, H, W]``, ``time_rows [B, P]`` -> ``[B, C', H, W]``."""
        rows = iter(time_rows.split([resnet.rows for resnet in self._resnets()], dim=1))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = resnet(x, next(rows), self.ops)
                if block.attentions is not None:
                    x = block.attentions[i](x, self.ops)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block.resnets[0](x, next(rows), self.ops)
        if self.mid_block.attentions is not None:
            x = self.mid_block.attentions[0](x, self.ops)
        x = self.mid_block.resnets[1](x, next(rows), self.ops)
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                x = resnet(torch.cat([x, skips.pop()], dim=1), next(rows), self.ops)
                if block.attentions is not None:
                    x = block.attentions[i](x, self.ops)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        norm = self.conv_norm_out
        return self.conv_out(self.ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """``sample [B, C, H, W]``, the rest as in ``embed`` -> ``[B, C', H, W]``."""
        return self.trunk(sample, self.time_rows(self.embed(timestep, class_labels, target)))
