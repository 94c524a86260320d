"""The UNet of the field, driven by its published config: ``UNet2DModel`` and ``UNet2DConditionModel`` of diffusers.

Parameter names are those of diffusers, so published files load as they are. The forward pass is split where work stops
depending on the image: ``embed`` and ``time_rows`` depend on times and conditioning, ``contexts`` on the text alone;
both are computed once for a whole run. ``trunk`` is what runs at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import ShapeError
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models.config import Level, SelfAttention, Transformer, UNetConfig

TokenPair = tuple[Tensor, Tensor]  # keys and values of the conditioning, [B, heads, tokens, d] each


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


def embedding(count: int, width: int) -> nn.Embedding:
    """``nn.Embedding``, but what has no memory yet is not initialised: torch would load its whole compiler for it."""
    weight = torch.empty(count, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else nn.init.normal_(weight), freeze=False)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them: ``[B, in] -> [B, out]``; ``condition`` is added to the input."""

    def __init__(self, in_channels: int, out_channels: int, condition: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.cond_proj = nn.Linear(condition, in_channels, bias=False) if condition else None
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            features = features + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, time modulation, norm, SiLU, conv, plus the (projected) input; may resample after its SiLU."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, resample: str | None = None):
        super().__init__()
        self.groups, self.eps, self.resample = config.norm_num_groups, config.norm_eps, resample
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(self.groups, in_channels, self.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.rows = out_channels * (2 if self.scale_shift else 1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, self.rows)
        self.norm2 = nn.GroupNorm(self.groups, out_channels, self.eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time_row: Tensor, ops: Ops) -> Tensor:
        """``x [B, C, H, W]``, ``time_row [B, rows]`` (this block's slice of ``time_rows``) -> ``[B, C', H', W']``."""
        h = ops.group_norm_silu(x, self.norm1.weight, self.norm1.bias, self.groups, self.eps)
        if self.resample is not None:
            h, x = (resampled(part, self.resample) for part in (h, x))
        h = self.conv1(h)
        scale, shift = time_row.chunk(2, dim=1) if self.scale_shift else (None, None)
        row = None if self.scale_shift else time_row
        norm = self.norm2
        h = ops.group_norm_silu(h, norm.weight, norm.bias, self.groups, self.eps, scale=scale, shift=shift, row=row)
        h = self.conv2(h)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def resampled(x: Tensor, how: str) -> Tensor:
    """Halve ``[B, C, H, W]`` by means of 2x2 pixels (``"down"``), or double it by repetition (``"up"``)."""
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


def heads_of(tokens: Tensor, heads: int) -> Tensor:
    """``[B, L, heads * d]`` -> ``[B, heads, L, d]``, a view."""
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)


class PixelAttention(nn.Module):
    """Self-attention over the pixels, with a residual."""

    def __init__(self, config: UNetConfig, channels: int, attention: SelfAttention):
        super().__init__()
        self.heads, self.eps, groups = attention.heads, config.norm_eps, attention.groups
        self.group_norm = nn.GroupNorm(groups, channels, self.eps) if groups else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, as published: `to_out.0`

    def forward(self, x: Tensor, context: Iterator[TokenPair], ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``; no context is read."""
        batch, channels, height, width = x.shape
        y = x
        if self.group_norm is not None:
            norm = self.group_norm
            y = ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, self.eps, silu=False)
        tokens = y.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        q, k, v = (heads_of(applied(layer, tokens, ops), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = ops.attention(q, k, v).transpose(1, 2).reshape(batch, height * width, channels)
        mixed = applied(self.to_out[0], mixed, ops)
        return x + mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)


class TokenAttention(nn.Module):
    """Attention of a transformer layer: of the pixels among themselves, or to the conditioning's tokens."""

    def __init__(self, channels: int, context: int | None, heads: int, upcast: bool):
        super().__init__()
        self.heads, self.upcast, self.crosses = heads, upcast, context is not None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or channels, channels, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys_values(self, tokens: Tensor, ops: Ops) -> TokenPair:
        """``[B, L, E]`` -> keys and values ``[B, heads, L, d]``."""
        keys, values = (heads_of(applied(layer, tokens, ops), self.heads) for layer in (self.to_k, self.to_v))
        return keys, values

    def forward(self, x: Tensor, context: Iterator[TokenPair], ops: Ops) -> Tensor:
        """``[B, L, C] -> [B, L, C]``; takes its pair from ``context`` if it crosses."""
        q = heads_of(applied(self.to_q, x, ops), self.heads)
        k, v = next(context) if self.crosses else self.keys_values(x, ops)
        if self.upcast and torch.finfo(q.dtype).bits < 32:  # logits of these networks overflow float16
            mixed = ops.attention(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            mixed = ops.attention(q, k, v)
        return applied(self.to_out[0], mixed.transpose(1, 2).reshape(x.shape), ops)


class GEGLU(nn.Module):
    """``[B, L, C]`` -> ``[B, L, inner]``: half of the projection, gated by GELU of the other half."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        result: Tensor = ops.geglu(applied(self.proj, x, ops))
        return result


class FeedForward(nn.Module):
    """GEGLU and a projection; ``net.1`` is the dropout of training. Source: Shazeer 2020, arXiv:2002.05202, eq. 6."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return applied(self.net[2], self.net[0](x, ops), ops)


class TransformerLayer(nn.Module):
    """Attention, cross-attention and a feed-forward network, each with a norm before it and a residual."""

    def __init__(self, channels: int, spec: Transformer, upcast: bool):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = TokenAttention(channels, spec.context if spec.only_cross else None, spec.heads, upcast)
        self.attn2 = TokenAttention(channels, spec.context, spec.heads, upcast)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Iterator[TokenPair], ops: Ops) -> Tensor:
        """``[B, L, C] -> [B, L, C]``."""
        x = x + self.attn1(normed(self.norm1, x, ops), context, ops)
        x = x + self.attn2(normed(self.norm2, x, ops), context, ops)
        return x + self.ff(normed(self.norm3, x, ops), ops)


class SpatialTransformer(nn.Module):
    """Transformer layers over the pixels, between two projections, with a residual.

    Channels-last pixels are tokens already: neither the projections nor the layers move them.
    """

    def __init__(self, config: UNetConfig, channels: int, spec: Transformer):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, 1e-6)
        linear = config.use_linear_projection
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        layers = (TransformerLayer(channels, spec, config.upcast_attention) for _ in range(spec.depth))
        self.transformer_blocks = nn.ModuleList(layers)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Iterator[TokenPair], ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        batch, channels, height, width = x.shape
        norm = self.norm
        y = ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=False)
        tokens = applied(self.proj_in, y.permute(0, 2, 3, 1).reshape(batch, height * width, channels), ops)
        for layer in self.transformer_blocks:
            tokens = layer(tokens, context, ops)
        return x + applied(self.proj_out, tokens, ops).view(batch, height, width, channels).permute(0, 3, 1, 2)


def applied(layer: nn.Module, tokens: Tensor, ops: Ops) -> Tensor:
    """Apply a linear layer, or a 1x1 convolution, which is the same, to ``[B, L, C]``."""
    result: Tensor = ops.linear(tokens, layer.weight.flatten(1), layer.bias)
    return result


def normed(layer: nn.LayerNorm, tokens: Tensor, ops: Ops) -> Tensor:
    """Apply a layer norm to ``[B, L, C]``."""
    result: Tensor = ops.layer_norm(tokens, layer.weight, layer.bias, layer.eps)
    return result


def crossing_of(transformer: nn.Module) -> Iterator[TokenAttention]:
    """The attentions of a ``SpatialTransformer`` that read the conditioning, in order; others have none."""
    for layer in getattr(transformer, "transformer_blocks", ()):
        yield from (attention for attention in (layer.attn1, layer.attn2) if attention.crosses)


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
    """Nearest-neighbour enlargement, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int], ops: Ops) -> Tensor:
        """``[B, C, H, W] -> [B, C, *size]``."""
        result: Tensor = ops.upsample_conv(x, self.conv.weight, self.conv.bias, tuple(size))
        return result


class Block(nn.Module):
    """One resolution: ResNet blocks, attention after each where there is any, then a resampling.

    The resampling is ``downsamplers.0`` or ``upsamplers.0``: a convolution, or a ResNet block that resamples.
    """

    def __init__(self, config: UNetConfig, sizes: Sequence[tuple[int, int]], level: Level, way: str):
        super().__init__()
        out, spec = level.channels, level.attention
        self.resnets = nn.ModuleList(ResnetBlock(config, a, b) for a, b in sizes)
        self.attentions: nn.ModuleList | None = None
        if spec is not None:
            kind = SpatialTransformer if isinstance(spec, Transformer) else PixelAttention
            # the middle block has two ResNet blocks around one attention
            count = 1 if way == "middle" else len(sizes)
            self.attentions = nn.ModuleList(kind(config, out, spec) for _ in range(count))
        if level.resample == "resnet":
            sampler: nn.Module = ResnetBlock(config, out, out, way)
        else:
            sampler = Downsample(out, config.downsample_padding) if way == "down" else Upsample(out)
        if level.resample is not None:
            setattr(self, f"{way}samplers", nn.ModuleList([sampler]))

    def resampler(self) -> nn.Module | None:
        """What comes after the ResNet blocks, if anything."""
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                return getattr(self, name)[0]
        return None

    def all_resnets(self) -> list[ResnetBlock]:
        """Its ResNet blocks in the order in which they run."""
        sampler = self.resampler()
        return [*self.resnets, *([sampler] if isinstance(sampler, ResnetBlock) else [])]


class Encoder(nn.Module):
    """The way down and the middle: what a UNet and a ControlNet share."""

    def __init__(self, config: UNetConfig, target: TargetConfig | None = None, ops: Ops = REFERENCE):
        super().__init__()
        self.config, self.target, self.ops = config, target, ops
        channels, wide = config.block_out_channels, config.embedding_dim
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], wide, config.time_cond_proj_dim)
        labels, added = config.num_class_embeds, config.projection_class_embeddings_input_dim
        self.class_embedding = embedding(labels, wide) if labels else None
        self.add_embedding = TimestepEmbedding(added, wide) if config.addition_embed_type and added else None
        self.target_embedding = TimestepEmbedding(target.channels, wide) if target else None
        self.down_blocks = nn.ModuleList()
        self.skips, last = [channels[0]], channels[0]  # channels of what is kept on the way down
        for level in config.down_levels():
            out = level.channels
            sizes = [(last if i == 0 else out, out) for i in range(level.resnets)]
            self.down_blocks.append(Block(config, sizes, level, "down"))
            self.skips += [out] * (level.resnets + (level.resample is not None))
            last = out
        self.mid_block = Block(config, [(last, last)] * 2, Level(last, 2, config.middle(), None), "middle")

    def embed(
        self,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        target: Tensor | None = None,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Embed times and conditioning.

        Args:
            timestep: ``[B]``, in the units of training (``Path.timestep``).
            class_labels: ``[B]`` int64, or None for a network without classes.
            target: ``[B]``, where a flow map is to land, in the units of ``timestep``. None, or equal to ``timestep``,
                gives exactly the one-time network.
            text_embeds: ``[B, E]``, SDXL's pooled text.
            time_ids: ``[B, 6]``, SDXL's sizes and crop.
            timestep_cond: ``[B, E']``, the embedded guidance strength of an LCM.

        Returns:
            ``[B, embedding_dim]``.

        Raises:
            ShapeError: if the network needs conditioning that is not given.
        """
        config = self.config
        dtype = self.time_embedding.linear_1.weight.dtype

        def features(values: Tensor, dim: int) -> Tensor:
            return sinusoid(values, dim, flip=config.flip_sin_to_cos, shift=config.freq_shift).to(dtype)

        embedding = self.time_embedding(features(timestep, config.block_out_channels[0]), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ShapeError(f"class_labels is None; needed: [B] labels from 0 to {config.num_class_embeds}")
            embedding = embedding + self.class_embedding(class_labels)
        if self.add_embedding is not None:
            if text_embeds is None or time_ids is None:
                raise ShapeError(
                    "text_embeds and time_ids are needed by a network with addition_embed_type 'text_time'"
                )
            sizes = features(time_ids.flatten(), config.addition_time_embed_dim or 0).view(time_ids.shape[0], -1)
            embedding = embedding + self.add_embedding(torch.cat([text_embeds.to(dtype), sizes], dim=1))
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

    def blocks(self) -> list[Block]:
        """All blocks in the order in which they run."""
        return [*self.down_blocks, self.mid_block]

    def time_rows(self, embedding: Tensor) -> Tensor:
        """Project an embedding ``[B, E]`` for every ResNet block: ``[B, P]``, their rows side by side."""
        activated = F.silu(embedding)
        resnets = [resnet for block in self.blocks() for resnet in block.all_resnets()]
        return torch.cat([resnet.time_emb_proj(activated) for resnet in resnets], dim=1)

    def contexts(self, tokens: Tensor) -> list[TokenPair]:
        """Keys and values of the conditioning's tokens ``[B, L, E]`` for every attention that reads them, in order."""
        return [attention.keys_values(tokens, self.ops) for attention in self.crossing()]

    def crossing(self) -> Iterator[TokenAttention]:
        """Every attention that reads the conditioning, in the order in which they run."""
        for block in self.blocks():
            for transformer in block.attentions or ():
                yield from crossing_of(transformer)

    def encode(self, x: Tensor, rows: Iterator[Tensor], context: Iterator[TokenPair]) -> tuple[Tensor, list[Tensor]]:
        """Run down and through the middle, from what ``conv_in`` gave: the deepest features, and what is kept."""
        skips = list(self.descend(x, rows, context))
        x = skips[-1]
        middle = self.mid_block
        x = middle.resnets[0](x, next(rows), self.ops)
        if middle.attentions is not None:
            x = middle.attentions[0](x, context, self.ops)
        return middle.resnets[1](x, next(rows), self.ops), skips

    def descend(self, x: Tensor, rows: Iterator[Tensor], context: Iterator[TokenPair]) -> Iterator[Tensor]:
        """Run down layer by layer, from what ``conv_in`` gave; yields what each skip connection keeps, that first."""
        yield x
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = resnet(x, next(rows), self.ops)
                if block.attentions is not None:
                    x = block.attentions[i](x, context, self.ops)
                yield x
            sampler = block.resampler()
            if sampler is not None:
                x = sampler(x, next(rows), self.ops) if isinstance(sampler, ResnetBlock) else sampler(x)
                yield x

    def row_width(self) -> int:
        """``P``, the width of ``time_rows``."""
        return sum(resnet.rows for block in self.blocks() for resnet in block.all_resnets())

    def split_rows(self, time_rows: Tensor) -> Iterator[Tensor]:
        """Each ResNet block's part of ``time_rows [B, P]``, in order."""
        resnets = [resnet for block in self.blocks() for resnet in block.all_resnets()]
        return iter(time_rows.split([resnet.rows for resnet in resnets], dim=1))


class UNet(Encoder):
    """diffusers' ``UNet2DModel`` or ``UNet2DConditionModel``, with an optional second time.

    Args:
        config: the sizes.
        target: makes the network a flow map; its tensors, ``target_embedding.*``, live in a file of their own.
        ops: the kernels to use; ``fastdiff.kernels.REFERENCE`` is plain torch.
    """

    def __init__(self, config: UNetConfig, target: TargetConfig | None = None, ops: Ops = REFERENCE):
        super().__init__(config, target, ops)
        channels, skips = config.block_out_channels, list(self.skips)
        self.up_blocks, last = nn.ModuleList(), channels[-1]
        for level in config.up_levels():
            sizes = []
            for _ in range(level.resnets):
                sizes.append((last + skips.pop(), level.channels))
                last = level.channels
            self.up_blocks.append(Block(config, sizes, level, "up"))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def blocks(self) -> list[Block]:
        """All blocks in the order in which they run."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def trunk(
        self,
        x: Tensor,
        time_rows: Tensor,
        contexts: Sequence[TokenPair] = (),
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        """The part that runs at every step.

        Args:
            x: ``[B, C, H, W]``.
            time_rows: ``[B, P]``, of ``time_rows``.
            contexts: of ``contexts``; empty for a network without text.
            control: ControlNet's residuals, added to what is kept on the way down and, the last one, to the middle.

        Returns:
            ``[B, C', H, W]``.
        """
        rows, context = self.split_rows(time_rows), iter(contexts)
        x, skips = self.encode(self.conv_in(x), rows, context)
        if control:
            *down, middle = control
            x, skips = x + middle, [skip + more for skip, more in zip(skips, down, strict=True)]
        return self._ascend(x, skips, rows, context)[0]

    def parted(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], branch: int) -> tuple[Tensor, Tensor]:
        """``trunk``, which also gives what ``shallow`` needs to leave out the layers below a skip connection.

        Args:
            x: as of ``trunk``.
            time_rows: as of ``trunk``.
            contexts: as of ``trunk``.
            branch: number of the skip connection, from 0, what ``conv_in`` gives, to ``len(skips) - 1``.

        Returns:
            The output, and the deep features that join that skip connection, ``[B, C'', H'', W'']``.

        Source: Ma et al. 2023, DeepCache, arXiv:2312.00858, sec. 3.
        """
        rows, context = self.split_rows(time_rows), iter(contexts)
        x, skips = self.encode(self.conv_in(x), rows, context)
        return self._ascend(x, skips, rows, context, branch)

    def shallow(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], branch: int, deep: Tensor) -> Tensor:
        """The output of the layers above a skip connection alone, with deep features that another call gave."""
        resnets, crossing = self.above(branch)
        down = self.descend(self.conv_in(x), self.split_rows(time_rows), iter(contexts))
        skips = list(islice(down, branch + 1))
        rows = iter(list(self.split_rows(time_rows))[-len(resnets) :])
        return self._ascend(deep, skips, rows, iter(contexts[len(contexts) - crossing :]))[0]

    def above(self, branch: int) -> tuple[list[ResnetBlock], int]:
        """The ResNet blocks of the way up from where a skip connection joins, and how many attentions there cross."""
        resnets: list[ResnetBlock] = []
        crossing, left = 0, len(self.skips)
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                left -= 1
                if left <= branch:
                    resnets.append(resnet)
                    crossing += 0 if block.attentions is None else len(list(crossing_of(block.attentions[i])))
            sampler = block.resampler()
            if isinstance(sampler, ResnetBlock) and left <= branch:
                resnets.append(sampler)
        return resnets, crossing

    def _ascend(
        self, x: Tensor, skips: list[Tensor], rows: Iterator[Tensor], context: Iterator[TokenPair], branch: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run up from the first of ``skips`` that is left; returns the output, and what joined that of ``branch``."""
        first, left, deep = len(skips), len(self.skips), x
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                left -= 1
                if left >= first:
                    continue
                if left == branch:
                    deep = x
                x = resnet(torch.cat([x, skips.pop()], dim=1), next(rows), self.ops)
                if block.attentions is not None:
                    x = block.attentions[i](x, context, self.ops)
            sampler = block.resampler() if left < first else None
            if isinstance(sampler, ResnetBlock):
                x = sampler(x, next(rows), self.ops)
            elif sampler is not None:
                x = sampler(x, skips[-1].shape[2:], self.ops)
        norm = self.conv_norm_out
        return self.conv_out(self.ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)), deep

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        target: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        """``sample [B, C, H, W]``, tokens ``[B, L, E]``, the rest as in ``embed`` and ``trunk``: ``[B, C', H, W]``."""
        embedding = self.embed(
            timestep, class_labels, target, text_embeds=text_embeds, time_ids=time_ids, timestep_cond=timestep_cond
        )
        if encoder_hidden_states is None and self.config.conditional:
            raise ShapeError("encoder_hidden_states is None; needed: [B, tokens, width] of the conditioning")
        contexts = [] if encoder_hidden_states is None else self.contexts(encoder_hidden_states)
        return self.trunk(sample, self.time_rows(embedding), contexts, control)
