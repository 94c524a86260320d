"""A UNet's trunk as a list of ops of the CPU runtime: every layer of ``fastdiff.models.unet`` in those terms."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from fastdiff.backends.program import Program, Value
from fastdiff.errors import ShapeError
from fastdiff.models.unet import (
    Block,
    Downsample,
    Encoder,
    PixelAttention,
    ResnetBlock,
    SpatialTransformer,
    TokenAttention,
    UNet,
)


class Keys(NamedTuple):
    """Where the keys and values of one attention to the conditioning lie: ``[batch, heads, count, d]``."""

    name: str
    batch: int
    heads: int
    count: int
    d: int
    strides: tuple[int, int, int]  # floats from one image, head and key to the next


def keys_of(index: int, keys: Tensor) -> Keys:
    """The layout of ``[B, heads, tokens, d]`` keys, whose last axis is dense; the values have the same."""
    batch, heads, count, d = keys.shape
    return Keys(str(index), batch, heads, count, d, (keys.stride(0), keys.stride(1), keys.stride(2)))


class Shape(NamedTuple):
    """What a program is made for: the shapes of what ``UNet.trunk`` is given."""

    x: tuple[int, ...]
    rows: tuple[int, ...]
    contexts: tuple[Keys, ...] = ()
    control: tuple[tuple[int, ...], ...] = ()
    branch: int | None = None  # with a cut at this skip connection: ``UNet.parted``
    deep: tuple[int, ...] | None = None  # and with what joins it given: ``UNet.shallow``


def lower(unet: UNet, shape: Shape) -> Program:
    """The ops of ``unet.trunk`` for one shape.

    The program's externals: ``x``, ``rows``, ``out``, ``keys0``, ``values0``..., and with control ``control0``...; with
    a cut its result ``deep``, or the external of that name.

    Raises:
        ShapeError: if anything has another shape than the network needs; the ops themselves check nothing.
    """
    lowering = _Lowering(unet, Program(shape.x[0]), shape)
    batch, channels, height, width = shape.x
    _need("x", shape.x, (batch, unet.config.in_channels, height, width))
    _need("time_rows", shape.rows, (batch, lowering.stride))
    _need("number of contexts", len(shape.contexts), sum(1 for _ in unet.crossing()))
    return lowering.run(height, width)


def _need(name: str, given: object, needed: object) -> None:
    if given != needed:
        raise ShapeError(f"{name} is {given}; needed: {needed}")


class _Lowering:
    def __init__(self, unet: UNet, program: Program, shape: Shape):
        self.unet, self.program, self.shape, self.crossed = unet, program, shape, 0
        self.stride = unet.row_width()
        self.done = 0  # time rows given out so far

    def run(self, height: int, width: int) -> Program:
        unet, program = self.unet, self.program
        x = Value(program.given("x"), height, width, unet.config.in_channels, unet.config.in_channels)
        x = program.conv([x], [unet.conv_in.weight], [unet.conv_in.bias], kernel=3)
        x, skips = self.encode(unet, x) if self.shape.deep is None else self.shallow(x)
        if self.shape.control:
            _need("control", len(self.shape.control), len(skips) + 1)
            *skips, x = (self.control(i, value) for i, value in enumerate([*skips, x]))
        first, left = len(skips), len(unet.skips)
        for block in unet.up_blocks:
            for i, resnet in enumerate(block.resnets):
                left -= 1
                if left >= first:  # below the cut
                    continue
                if left == self.shape.branch and self.shape.deep is None:
                    program.results["deep"] = x
                x = self.resnet(resnet, [x, skips.pop()])
                x = self.attended(block, i, x)
            sampler = block.resampler() if left < first else None
            if isinstance(sampler, ResnetBlock):
                x = self.resnet(sampler, [x])
            elif sampler is not None:
                size = (skips[-1].height, skips[-1].width)
                x = program.conv([x], [sampler.conv.weight], [sampler.conv.bias], kernel=3, size=size)
        norm, last = unet.conv_norm_out, unet.conv_out
        stats = program.norm([x], norm.weight, norm.bias, norm.num_groups, norm.eps)
        channels = unet.config.out_channels
        out = Value(program.given("out"), height, width, channels, channels)
        program.conv([x], [last.weight], [last.bias], kernel=3, stats=stats, silu=True, out=out)
        return program

    def encode(self, encoder: Encoder, x: Value) -> tuple[Value, list[Value]]:
        skips = list(self.descend(encoder, x))
        x = skips[-1]
        middle = encoder.mid_block
        x = self.attended(middle, 0, self.resnet(middle.resnets[0], [x]))
        return self.resnet(middle.resnets[1], [x]), skips

    def descend(self, encoder: Encoder, x: Value) -> Iterator[Value]:
        yield x
        for block in encoder.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = self.attended(block, i, self.resnet(resnet, [x]))
                yield x
            sampler = block.resampler()
            if isinstance(sampler, ResnetBlock):
                x = self.resnet(sampler, [x])
            elif isinstance(sampler, Downsample):
                conv = sampler.conv
                x = self.program.conv([x], [conv.weight], [conv.bias], kernel=3, stride=2, pad=sampler.padding)
            if sampler is not None:
                yield x

    def shallow(self, x: Value) -> tuple[Value, list[Value]]:
        """The way down to the cut; and what joins there, which is given."""
        branch, shape = self.shape.branch, self.shape.deep
        assert branch is not None and shape is not None
        skips = list(islice(self.descend(self.unet, x), branch + 1))
        self.program.cut = len(self.program.ops)
        resnets, crossing = self.unet.above(branch)
        self.done = self.stride - sum(resnet.rows for resnet in resnets)
        self.crossed = len(self.shape.contexts) - crossing
        channels, last = resnets[0].conv1.in_channels - self.unet.skips[branch], skips[-1]
        _need("deep", shape, (self.program.batch, channels, last.height, last.width))
        return Value(self.program.given("deep"), last.height, last.width, channels, channels), skips

    def control(self, index: int, value: Value) -> Value:
        needed = (self.program.batch, value.channels, value.height, value.width)
        _need(f"control {index}", self.shape.control[index], needed)
        more = value._replace(slot=self.program.given(f"control{index}"), ld=value.channels)
        return self.program.add(value, more)

    def row(self, resnet: ResnetBlock) -> tuple[int, int]:
        slot = self.program.behind(self.program.given("rows"), self.done)
        self.done += resnet.rows
        return slot, self.stride

    def resnet(self, resnet: ResnetBlock, sources: list[Value]) -> Value:
        program, row, none = self.program, self.row(resnet), (-1, 0)
        for source in sources[1:]:
            sizes = [(value.height, value.width) for value in (sources[0], source)]
            _need("size of what is joined to what the way down kept", *sizes)
        norm, first, second = resnet.norm1, resnet.conv1, resnet.conv2
        stats = program.norm(sources, norm.weight, norm.bias, norm.num_groups, norm.eps)
        time = none if resnet.scale_shift else row
        if resnet.resample is None:
            h = program.conv(sources, [first.weight], [first.bias], kernel=3, stats=stats, silu=True, row=time)
        else:
            (x,) = sources
            down = resnet.resample == "down"
            size = (x.height // 2, x.width // 2) if down else (2 * x.height, 2 * x.width)
            h = program.resample(sources, *size, stats=stats, silu=True)
            h = program.conv([h], [first.weight], [first.bias], kernel=3, row=time)
            sources = [program.resample(sources, *size)]
        if resnet.conv_shortcut is not None:
            residual = program.conv(sources, [resnet.conv_shortcut.weight], [resnet.conv_shortcut.bias])
        elif len(sources) == 1:
            residual = sources[0]
        else:
            residual = program.resample(sources, sources[0].height, sources[0].width)
        norm = resnet.norm2
        stats = program.norm(
            [h], norm.weight, norm.bias, norm.num_groups, norm.eps, row if resnet.scale_shift else none
        )
        return program.conv([h], [second.weight], [second.bias], kernel=3, stats=stats, silu=True, residual=residual)

    def attended(self, block: Block, index: int, x: Value) -> Value:
        if block.attentions is None:
            return x
        layer = block.attentions[index]
        return self.pixels(layer, x) if isinstance(layer, PixelAttention) else self.transformer(layer, x)

    def self_attention(self, layer: PixelAttention | TokenAttention, x: Value, stats: int = -1) -> Value:
        """Queries, keys and values in one product, then the attention."""
        projections = (layer.to_q, layer.to_k, layer.to_v)
        three = self.program.conv([x], [p.weight for p in projections], [p.bias for p in projections], stats=stats)
        c = three.channels // 3
        q, k, v = (self.program.part(three, i * c, c) for i in range(3))
        count = x.height * x.width
        strides = (count * three.ld, c // layer.heads, three.ld)
        return self.program.attention(q, k.slot, v.slot, count, layer.heads, strides)

    def pixels(self, layer: PixelAttention, x: Value) -> Value:
        stats, norm, last = -1, layer.group_norm, layer.to_out[0]
        if norm is not None:
            stats = self.program.norm([x], norm.weight, norm.bias, norm.num_groups, norm.eps)
        mixed = self.self_attention(layer, x, stats)
        return self.program.conv([mixed], [last.weight], [last.bias], residual=x)

    def tokens(self, layer: TokenAttention, x: Value, residual: Value) -> Value:
        if layer.crosses:
            keys = self.shape.contexts[self.crossed]
            self.crossed += 1
            q = self.program.conv([x], [layer.to_q.weight], [layer.to_q.bias])
            needed = (self.program.batch, layer.heads, q.channels // layer.heads)
            _need(f"context {keys.name}: batch, heads and width", (keys.batch, keys.heads, keys.d), needed)
            k, v = self.program.given(f"keys{keys.name}"), self.program.given(f"values{keys.name}")
            mixed = self.program.attention(q, k, v, keys.count, layer.heads, keys.strides)
        else:
            mixed = self.self_attention(layer, x)
        last = layer.to_out[0]
        return self.program.conv([mixed], [last.weight], [last.bias], residual=residual)

    def transformer(self, layer: SpatialTransformer, x: Value) -> Value:
        program, norm = self.program, layer.norm
        stats = program.norm([x], norm.weight, norm.bias, norm.num_groups, norm.eps)
        tokens = program.conv([x], [layer.proj_in.weight], [layer.proj_in.bias], stats=stats)

        def normed(norm: object) -> Value:
            return program.layer_norm(tokens, norm.weight, norm.bias, norm.eps)  # type: ignore[attr-defined]

        for block in layer.transformer_blocks:
            tokens = self.tokens(block.attn1, normed(block.norm1), tokens)
            tokens = self.tokens(block.attn2, normed(block.norm2), tokens)
            up, down = block.ff.net[0].proj, block.ff.net[2]
            inner = program.conv([normed(block.norm3)], [up.weight], [up.bias], gated=True)
            tokens = program.conv([inner], [down.weight], [down.bias], residual=tokens)
        return program.conv([tokens], [layer.proj_out.weight], [layer.proj_out.bias], residual=x)
