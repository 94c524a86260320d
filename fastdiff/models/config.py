"""The sizes of a UNet as diffusers writes them in ``config.json``, and what they mean block by block.

``UNetConfig`` keeps the published names of ``UNet2DModel`` and ``UNet2DConditionModel``; ``levels`` spells out what the
network has to build. What the arithmetic does not honour is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from fastdiff.errors import ArtifactError
from fastdiff.models.fields import is_size
from fastdiff.models.files import shown

UNCONDITIONAL, CONDITIONAL = "UNet2DModel", "UNet2DConditionModel"
DOWN = {
    UNCONDITIONAL: ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    CONDITIONAL: ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
}
UP = {kind: tuple(name.replace("Downsample", "Upsample").replace("Down", "Up") for name in DOWN[kind]) for kind in DOWN}
MIDDLE = {UNCONDITIONAL: "UNetMidBlock2D", CONDITIONAL: "UNetMidBlock2DCrossAttn"}
# What a config may say only in one way: anything else would change the arithmetic.
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_scale_factor": (1, 1.0),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}
ALSO_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    UNCONDITIONAL: {"num_train_timesteps": (None, 1000)},
    CONDITIONAL: {
        "reverse_transformer_layers_per_block": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),  # diffusers refuses it too; attention_head_dim holds the number of heads
        "dual_cross_attention": (False, None),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1, 1.0),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False, True),  # says nothing about this middle block
        "cross_attention_norm": (None,),
        "addition_embed_type_num_heads": (64,),  # of an embedding that is refused
    },
}
MOST = 1_000_000
MOST_LAYERS = 768  # ResNet blocks and transformer layers of the whole network: SDXL has 87; more take seconds to build


class SelfAttention(NamedTuple):
    """Attention over the pixels after each ResNet block."""

    heads: int
    groups: int | None  # of its norm; None: it has none


class Transformer(NamedTuple):
    """Transformer layers after each ResNet block, which read the conditioning."""

    heads: int
    depth: int
    context: int  # width of the conditioning's tokens
    only_cross: bool  # the first attention of a layer reads the conditioning too


class Level(NamedTuple):
    """One resolution of the network, on the way down or up."""

    channels: int
    resnets: int
    attention: SelfAttention | Transformer | None
    resample: str | None  # "conv", "resnet", or None where the next level has the same resolution


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of one UNet, under diffusers' names. The defaults are those of ``UNet2DModel``."""

    kind: str = UNCONDITIONAL
    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str | None = MIDDLE[UNCONDITIONAL]
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    layers_per_block: int | tuple[int, ...] = 2
    time_embedding_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    attention_head_dim: int | tuple[int, ...] | None = 8  # conditional networks: the number of heads
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    num_class_embeds: int | None = None
    downsample_padding: int = 1
    dropout: float = 0.0
    # UNet2DModel alone
    add_attention: bool = True
    attn_norm_num_groups: int | None = None
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    # UNet2DConditionModel alone
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    only_cross_attention: bool | tuple[bool, ...] = False
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a ``config.json``.

        Raises:
            ArtifactError: naming the first key whose value is unknown, damaged or not supported.
        """
        kind = config.get("_class_name", UNCONDITIONAL)
        if not isinstance(kind, str) or kind not in DOWN:
            raise ArtifactError(f"config.json: _class_name is {shown(kind)}; supported: {', '.join(map(repr, DOWN))}")
        fixed = FIXED | ALSO_FIXED[kind]
        values: dict[str, Any] = dict(_CONDITIONAL_DEFAULTS) if kind == CONDITIONAL else {}
        for key, value in config.items():
            if key in _KEYS[kind]:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif key in fixed:
                if not any(
                    value is allowed or (value == allowed and type(value) is type(allowed)) for allowed in fixed[key]
                ):
                    raise ArtifactError(f"config.json: {key} is {shown(value)}; supported: {fixed[key]}")
            elif not key.startswith("_"):
                raise ArtifactError(f"config.json: unknown key {shown(key)} (value {shown(value)}) of a {kind}")
        result = cls(kind, **values)
        _Check(result).all()
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return what ``from_dict`` reads."""
        values = {key: value for key, value in asdict(self).items() if key in _KEYS[self.kind]}
        return {"_class_name": self.kind, **values}

    @property
    def conditional(self) -> bool:
        """Does the network read tokens (``encoder_hidden_states``)?"""
        return self.kind == CONDITIONAL

    @property
    def embedding_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def down_levels(self) -> list[Level]:
        """What to build on the way down."""
        last = len(self.block_out_channels) - 1
        return [
            Level(
                channels,
                self._each("layers_per_block", i),
                self._attention(kind, i),
                None if i == last else self._resample(kind, self.downsample_type),
            )
            for i, (channels, kind) in enumerate(zip(self.block_out_channels, self.down_block_types, strict=True))
        ]

    def up_levels(self) -> list[Level]:
        """What to build on the way up, deepest first; each level has one ResNet block more than its twin."""
        last = len(self.block_out_channels) - 1
        return [
            Level(
                self.block_out_channels[last - i],
                self._each("layers_per_block", last - i) + 1,
                self._attention(kind, last - i),
                None if i == last else self._resample(kind, self.upsample_type),
            )
            for i, kind in enumerate(self.up_block_types)
        ]

    def middle(self) -> SelfAttention | Transformer | None:
        """The attention between the two ResNet blocks in the middle."""
        last = len(self.block_out_channels) - 1
        if self.conditional:
            return self._transformer(last, only_cross=False)
        if not self.add_attention:
            return None
        # diffusers drops this norm under scale_shift unless the config names its groups
        plain = self.norm_num_groups if self.resnet_time_scale_shift == "default" else None
        return self._self_attention(last)._replace(groups=self.attn_norm_num_groups or plain)

    def _each(self, key: str, level: int) -> Any:
        """A setting that is given once or for each level."""
        value = getattr(self, key)
        return value[level] if isinstance(value, tuple) else value

    def _attention(self, kind: str, level: int) -> SelfAttention | Transformer | None:
        if kind.startswith("CrossAttn"):
            return self._transformer(level, self._each("only_cross_attention", level))
        return self._self_attention(level) if kind.startswith("Attn") else None

    def _self_attention(self, level: int) -> SelfAttention:
        channels = self.block_out_channels[level]
        return SelfAttention(channels // min(self._each("attention_head_dim", level) or channels, channels),
                             self.norm_num_groups)  # fmt: skip

    def _transformer(self, level: int, only_cross: bool) -> Transformer:
        return Transformer(
            self._each("attention_head_dim", level),
            self._each("transformer_layers_per_block", level),
            self._each("cross_attention_dim", level),
            only_cross,
        )

    def _resample(self, block: str, kind: str) -> str:
        if block.startswith("Resnet"):
            return "resnet"
        return kind if block.startswith("Attn") else "conv"


_ONLY_PLAIN = {"add_attention", "attn_norm_num_groups", "downsample_type", "upsample_type"}
_ONLY_CONDITIONAL = {
    "cross_attention_dim", "transformer_layers_per_block", "only_cross_attention", "use_linear_projection",
    "upcast_attention", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
}  # fmt: skip
_ALL = {field.name for field in fields(UNetConfig)} - {"kind"}
_KEYS = {UNCONDITIONAL: _ALL - _ONLY_CONDITIONAL, CONDITIONAL: _ALL - _ONLY_PLAIN}
_CONDITIONAL_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": MIDDLE[CONDITIONAL],
}


class _Check:
    """Refuses values that no network can be built from, before anything is built."""

    def __init__(self, config: UNetConfig):
        self.config = config

    def need(self, condition: bool, key: str, allowed: str) -> None:
        if not condition:
            raise ArtifactError(f"config.json: {key} is {shown(getattr(self.config, key))}; allowed: {allowed}")

    def all(self) -> None:
        config = self.config
        for key, most in (("in_channels", 4096), ("out_channels", 4096), ("norm_num_groups", 4096)):
            self.need(is_size(getattr(config, key), most), key, f"a whole number from 1 to {most}")
        size = config.sample_size
        self.need(size is None or is_size(size, 16384), "sample_size", "null or a whole number from 1 to 16384")
        for key in ("time_embedding_dim", "attn_norm_num_groups", "num_class_embeds", "addition_time_embed_dim",
                    "projection_class_embeddings_input_dim", "time_cond_proj_dim"):  # fmt: skip
            value = getattr(config, key)
            self.need(value is None or is_size(value, MOST), key, f"null or a whole number from 1 to {MOST}")
        self.channels()
        self.blocks()
        self.heads()
        self.plain()
        self.embeddings()
        layers = _depth(config.middle()) + sum(
            level.resnets * (1 + _depth(level.attention)) for level in config.down_levels() + config.up_levels()
        )
        if layers > MOST_LAYERS:
            raise ArtifactError(f"config.json: {layers} layers in all; allowed: at most {MOST_LAYERS}")

    def channels(self) -> None:
        channels, groups = self.config.block_out_channels, self.config.norm_num_groups
        listed = isinstance(channels, tuple) and 1 <= len(channels) <= 16
        self.need(listed, "block_out_channels", "a list of 1 to 16 sizes")
        fits = all(is_size(value, 65536) and value % groups == 0 for value in channels)
        self.need(fits, "block_out_channels", f"multiples of norm_num_groups={groups} up to 65536")

    def each(self, key: str, most: int) -> None:
        """A number, or one for each level."""
        value, count = getattr(self.config, key), len(self.config.block_out_channels)
        right = is_size(value, most) or (
            isinstance(value, tuple) and len(value) == count and all(is_size(v, most) for v in value)
        )
        self.need(right, key, f"a whole number from 1 to {most}, or {count} of them")

    def blocks(self) -> None:
        config, count = self.config, len(self.config.block_out_channels)
        for key, known in (("down_block_types", DOWN[config.kind]), ("up_block_types", UP[config.kind])):
            types = getattr(config, key)
            right = isinstance(types, tuple) and len(types) == count
            right = right and all(isinstance(t, str) and t in known for t in types)
            self.need(right, key, f"{count} of {', '.join(known)}")
        self.need(config.mid_block_type == MIDDLE[config.kind], "mid_block_type", repr(MIDDLE[config.kind]))
        if config.conditional:
            self.each("layers_per_block", 64)
        else:
            self.need(is_size(config.layers_per_block, 64), "layers_per_block", "a whole number from 1 to 64")
        for key in ("downsample_type", "upsample_type"):
            self.need(getattr(config, key) in ("conv", "resnet"), key, "'conv' or 'resnet'")

    def heads(self) -> None:
        config, channels = self.config, self.config.block_out_channels
        value = config.attention_head_dim
        if not config.conditional:
            self.need(value is None or is_size(value, MOST), "attention_head_dim", "null or a whole number from 1")
            right = all(size % min(value or size, size) == 0 for size in channels)
            self.need(right, "attention_head_dim", "a divisor of every block's channels")
            groups = config.attn_norm_num_groups
            self.need(
                groups is None or channels[-1] % groups == 0, "attn_norm_num_groups", f"a divisor of {channels[-1]}"
            )
            return
        self.each("attention_head_dim", 4096)
        right = all(size % config._each("attention_head_dim", i) == 0 for i, size in enumerate(channels))
        self.need(right, "attention_head_dim", "numbers of heads that divide their block's channels")
        self.each("transformer_layers_per_block", 64)
        self.each("cross_attention_dim", 65536)
        only = config.only_cross_attention
        right = isinstance(only, bool) or (
            isinstance(only, tuple) and len(only) == len(channels) and all(isinstance(value, bool) for value in only)
        )
        self.need(right, "only_cross_attention", f"true, false, or {len(channels)} of them")

    def plain(self) -> None:
        config = self.config
        for key in ("flip_sin_to_cos", "add_attention", "use_linear_projection", "upcast_attention"):
            self.need(isinstance(getattr(config, key), bool), key, "true or false")
        known = ("default", "scale_shift")
        self.need(config.resnet_time_scale_shift in known, "resnet_time_scale_shift", "'default' or 'scale_shift'")
        self.need(_is_bit(config.downsample_padding), "downsample_padding",
                  "0 or 1")  # fmt: skip
        self.need(isinstance(config.norm_eps, float) and 0 < config.norm_eps < 1, "norm_eps", "a number inside (0, 1)")
        self.need(_is_bit(config.freq_shift), "freq_shift", "0 or 1")
        dropout = config.dropout
        right = isinstance(dropout, int | float) and math.isfinite(dropout) and 0 <= dropout < 1
        self.need(right, "dropout", "a number from 0, below 1")

    def embeddings(self) -> None:
        config = self.config
        self.need(config.addition_embed_type in (None, "text_time"), "addition_embed_type", "null or 'text_time'")
        if config.addition_embed_type == "text_time":
            for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                self.need(getattr(config, key) is not None, key, "a size, as addition_embed_type is 'text_time'")


def _depth(attention: SelfAttention | Transformer | None) -> int:
    return attention.depth if isinstance(attention, Transformer) else 0


def _is_bit(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (0, 1)
