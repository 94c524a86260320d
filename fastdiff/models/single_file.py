"""Single-file Stable Diffusion checkpoints in the layout they were trained in, renamed to diffusers' and transformers'.

One ``.safetensors`` file holds a UNet, a VAE and one or two text encoders, numbered as lists of blocks. Everything here
is a function of names and tensors: ``detect`` says what a file is, ``convert`` takes it apart, ``*_config`` give the
configs that belong to the parts. No tensor is computed with; three kinds change shape: the packed attention projections
of OpenCLIP are split, its text projection is transposed, and the VAE's 1x1 convolutions in attention become linear.

Text encoders get the names that published folders hold, ``text_model.*``. transformers from 5.6 on drops that prefix in
memory for ``CLIPTextModel`` alone, and still reads and writes it in files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from fastdiff.errors import ArtifactError

UNET, VAE = "model.diffusion_model.", "first_stage_model."

# Where each family keeps its text encoders, in the order of the pipeline, and who wrote them.
_ENCODERS: dict[str, tuple[tuple[str, str], ...]] = {
    "sd1": (("cond_stage_model.transformer.", "clip"),),
    "sd2": (("cond_stage_model.model.", "open_clip"),),
    "sdxl": (("conditioner.embedders.0.transformer.", "clip"), ("conditioner.embedders.1.model.", "open_clip")),
}

# Patterns of names that are left behind, and what they are.
DROPPED: dict[str, str] = {
    "model_ema.*": "running averages of training",
    "*.model_ema.*": "running averages of training",
    "betas": "the noise schedule, which the scheduler's config gives",
    "alphas_cumprod*": "the noise schedule",
    "sqrt_*alphas_cumprod": "the noise schedule",
    "sqrt_recipm1_alphas_cumprod": "the noise schedule",
    "log_one_minus_alphas_cumprod": "the noise schedule",
    "posterior_*": "the noise schedule",
    "denoiser.sigmas": "the noise schedule",
    "lvlb_weights": "weights of the training loss",
    "logvar": "weights of the training loss",
    "scale_factor": "the scale of the latents, which the VAE's config gives",
    "first_stage_model.loss.*": "the VAE's training loss",
    "loss.*": "the VAE's training loss, in a file of its own",
    "*.position_ids": "the numbers 0 to 76",
    "*.logit_scale": "the temperature of CLIP's training loss",
    "*.attn_mask": "the causal mask",
    "v_pred": "a mark, read by detect",
    "ztsnr": "a mark, read by detect",
    "global_step": "progress of training",
}

# What tells a family: the width of the context that its cross-attention reads.
_CONTEXT = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_FIRST = UNET + "input_blocks.0.0.weight"
_FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_NOT_OURS = {
    "edm_mean": "a Playground 2.5 model (EDM preconditioning)",
    "edm_vpred.sigma_max": "a model with EDM preconditioning",
    "control_model.time_embed.0.weight": "a ControlNet",
    UNET + "joint_blocks.0.x_block.mlp.fc1.weight": "Stable Diffusion 3",
    UNET + "double_blocks.0.img_attn.norm.key_norm.scale": "FLUX",
}
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is: the family, and the few facts in which members of a family differ."""

    family: str  # 'sd1', 'sd2' or 'sdxl'
    in_channels: int = 4  # 9 for inpainting: latents, mask, masked image
    prediction: str = "epsilon"  # or 'v_prediction'
    zero_terminal_snr: bool = False  # trained down to pure noise

    @property
    def inpainting(self) -> bool:
        """Whether the network reads a mask and a masked image beside the latents."""
        return self.in_channels == 9

    @property
    def text_encoders(self) -> int:
        """How many text encoders the family has."""
        return len(_ENCODERS[self.family])


def detect(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, prediction: str | None = None
) -> Layout:
    """Tell what a checkpoint is, by names and shapes.

    Args:
        tensors: all tensors of the file, under their own names.
        metadata: the file's text facts; ``modelspec.prediction_type`` and ``modelspec.architecture`` are read.
        prediction: 'epsilon' or 'v_prediction', for files that do not say. Names and shapes never say: Stable Diffusion
            2.0-base and 2.1 differ in nothing else. It wins over the metadata; without both, epsilon is assumed.

    Raises:
        ArtifactError: if it is a refiner, another kind of model or not in the original layout.
    """
    for name, kind in _NOT_OURS.items():
        if name in tensors:
            raise ArtifactError(f"checkpoint is {kind} (it holds {name!r}); supported: SD 1.x, 2.x and SDXL base")
    for name in (_FIRST, _CONTEXT):
        if name not in tensors or tensors[name].ndim < 2:
            raise ArtifactError(
                f"checkpoint holds no {name!r} with two or more axes: not SD 1.x, 2.x or SDXL in the original layout"
            )
    width, (channels, inputs) = int(tensors[_CONTEXT].shape[-1]), tensors[_FIRST].shape[:2]
    if width == 1280 and channels == 384:
        raise ArtifactError("checkpoint is the SDXL refiner; supported: SD 1.x, 2.x and SDXL base")
    if width not in _FAMILIES or channels != 320:
        raise ArtifactError(
            f"checkpoint has {channels} channels and a context of {width}; "
            f"allowed: 320 channels and a context of {', '.join(map(str, _FAMILIES))}"
        )
    if inputs not in (4, 9):
        raise ArtifactError(f"{_FIRST!r} reads {inputs} channels; allowed: 4, or 9 for inpainting")
    said = prediction if prediction is not None else _stated_prediction(metadata or {}, "v_pred" in tensors)
    if said not in _PREDICTIONS:
        raise ArtifactError(f"prediction is {said!r}; allowed: 'epsilon' or 'v_prediction'")
    return Layout(_FAMILIES[width], int(inputs), _PREDICTIONS[said], "ztsnr" in tensors)


def _stated_prediction(metadata: Mapping[str, str], marked: bool) -> str:
    """What the file itself says. Source: github.com/Stability-AI/ModelSpec for the metadata."""
    if stated := metadata.get("modelspec.prediction_type"):
        return stated
    if metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        return "v"
    return "v" if marked else "epsilon"


def convert(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, dict[str, Tensor]]:
    """Take a whole checkpoint apart.

    Returns:
        Tensors under ``unet``, ``vae``, ``text_encoder`` and, for SDXL, ``text_encoder_2``.

    Raises:
        ArtifactError: naming a tensor that belongs to no part, or a part that is not in the file.
    """
    prefixes = [UNET, VAE, *(prefix for prefix, _ in _ENCODERS[layout.family])]
    for name in tensors:
        if not name.startswith(tuple(prefixes)) and not _is_dropped(name):
            raise ArtifactError(f"checkpoint holds {name!r}, which belongs to no part of {layout.family}")
    parts = {"unet": unet_tensors(tensors, layout), "vae": vae_tensors(tensors)}
    for index in range(layout.text_encoders):
        parts["text_encoder" if index == 0 else "text_encoder_2"] = text_encoder_tensors(tensors, layout, index)
    return parts


def unet_tensors(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rename ``model.diffusion_model.*`` to the names of diffusers' ``UNet2DConditionModel``.

    Raises:
        ArtifactError: naming the first tensor that has no place or is missing.
    """
    return _rename(_under(tensors, UNET), UNET, unet_modules(unet_config(layout)))


def vae_tensors(tensors: Mapping[str, Tensor], prefix: str = VAE) -> dict[str, Tensor]:
    """Rename ``first_stage_model.*`` to the names of diffusers' ``AutoencoderKL``.

    Args:
        tensors: of a checkpoint, or of a VAE in a file of its own.
        prefix: what its names start with; "" for a file of its own.

    Raises:
        ArtifactError: naming the first tensor that has no place or is missing.
    """
    renamed = _rename(_under(tensors, prefix), prefix, vae_modules())
    for name, tensor in renamed.items():
        if ".attentions." in name and name.endswith(".weight") and tensor.ndim > 2:
            renamed[name] = tensor.flatten(1)  # [C, C, 1, 1] -> [C, C]
    return renamed


def text_encoder_tensors(tensors: Mapping[str, Tensor], layout: Layout, index: int = 0) -> dict[str, Tensor]:
    """Rename one text encoder to the names of transformers' ``CLIPTextModel`` (``...WithProjection`` if it has one).

    Args:
        tensors: of the whole checkpoint.
        layout: its layout.
        index: 0, or 1 for SDXL's second encoder.

    Raises:
        ArtifactError: if there is no such encoder, or naming the first tensor that has no place or is missing.
    """
    if not 0 <= index < layout.text_encoders:
        raise ArtifactError(f"text encoder {index} of {layout.family}; allowed: 0 to {layout.text_encoders - 1}")
    prefix, author = _ENCODERS[layout.family][index]
    config, found = text_encoder_config(layout, index), _under(tensors, prefix)
    layers = config["num_hidden_layers"]
    if author == "clip":
        return _rename(_with_text_model(found), prefix, clip_modules(layers))
    projected = config["architectures"] == ["CLIPTextModelWithProjection"]
    if not projected:
        # SD 2 reads the last layer but one, so its published encoder ends there
        unread = f"transformer.resblocks.{layers}."
        found = {n: t for n, t in found.items() if not n.startswith(unread) and n != "text_projection"}
    return _rename(_unpacked(found, prefix), prefix, open_clip_modules(layers, projected))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part, without its prefix and without what is dropped."""
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and not _is_dropped(n)}
    if not found:
        raise ArtifactError(f"checkpoint holds no tensor under {prefix!r}")
    return found


def _is_dropped(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in DROPPED)


def _rename(found: Mapping[str, Tensor], prefix: str, modules: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace each module's old name by its new one; nothing left over, nothing missing."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in found.items():
        module, _, kind = name.rpartition(".")
        if module not in modules or kind not in ("weight", "bias"):
            raise ArtifactError(f"checkpoint holds {prefix + name!r}, which has no place in its model")
        renamed[f"{modules[module]}.{kind}"] = tensor
    for module in modules:
        if f"{module}.weight" not in found and not module.endswith(_SHORTCUTS):
            raise ArtifactError(f"checkpoint holds no {f'{prefix}{module}.weight'!r}")
    return renamed


# --- module names: old -> new -------------------------------------------------------------------------------------

_SHORTCUTS = ("skip_connection", "nin_shortcut")  # only where a block changes the number of channels

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_ADDED = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = ("norm", "proj_in", "proj_out")  # the same in both, as are the layers inside
_TRANSFORMER = tuple(
    [f"attn{i}.{projection}" for i in (1, 2) for projection in ("to_q", "to_k", "to_v", "to_out.0")]
    + ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
)
_VAE_ENDS = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_CLIP_LAYER = tuple(f"self_attn.{p}_proj" for p in "qkv") + (
    "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
_OPEN_CLIP_LAYER = {
    **{f"attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkv"},  # after _unpacked
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _inside(old: str, new: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{a}": f"{new}.{b}" for a, b in parts.items()}


def _transformer(old: str, new: str, depth: int) -> dict[str, str]:
    parts = [*_ATTENTION, *(f"transformer_blocks.{i}.{part}" for i in range(depth) for part in _TRANSFORMER)]
    return _inside(old, new, {part: part for part in parts})


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Every module of a UNet that has parameters: its original name to diffusers' name.

    The original counts the blocks of all levels in one list: a level has ``layers_per_block`` of them and then one that
    resamples on the way down, one more of them on the way up, where resampling is the last child of the last block.

    Args:
        config: as ``unet_config`` gives it.
    """
    down, layers = config["down_block_types"], config["layers_per_block"]
    levels, attends = len(down), [kind.startswith("CrossAttn") for kind in down]
    depth = config.get("transformer_layers_per_block", 1)
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    names = _UNET_ENDS | (_UNET_ADDED if config.get("addition_embed_type") else {})
    for level in range(levels):
        for i in range(layers):
            old = f"input_blocks.{1 + level * (layers + 1) + i}"
            names |= _inside(f"{old}.0", f"down_blocks.{level}.resnets.{i}", _UNET_RESNET)
            if attends[level]:
                names |= _transformer(f"{old}.1", f"down_blocks.{level}.attentions.{i}", depths[level])
        if level < levels - 1:
            names[f"input_blocks.{(level + 1) * (layers + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    names |= _inside("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    names |= _transformer("middle_block.1", "mid_block.attentions.0", depths[-1])
    names |= _inside("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)
    for level, below in enumerate(reversed(range(levels))):
        for i in range(layers + 1):
            old = f"output_blocks.{level * (layers + 1) + i}"
            names |= _inside(f"{old}.0", f"up_blocks.{level}.resnets.{i}", _UNET_RESNET)
            if attends[below]:
                names |= _transformer(f"{old}.1", f"up_blocks.{level}.attentions.{i}", depths[below])
        if level < levels - 1:
            last = f"output_blocks.{level * (layers + 1) + layers}.{2 if attends[below] else 1}"
            names[f"{last}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def vae_modules(levels: int = 4, layers: int = 2) -> dict[str, str]:
    """Every module of a VAE that has parameters. The original counts the decoder's levels from the image inwards."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names |= _inside(half, half, _VAE_ENDS)
        for i in (1, 2):
            names |= _inside(f"{half}.mid.block_{i}", f"{half}.mid_block.resnets.{i - 1}", _VAE_RESNET)
        names |= _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(layers):
            names |= _inside(f"encoder.down.{level}.block.{i}", f"{down}.resnets.{i}", _VAE_RESNET)
        for i in range(layers + 1):
            names |= _inside(f"decoder.up.{level}.block.{i}", f"{up}.resnets.{i}", _VAE_RESNET)
        if level < levels - 1:
            names[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            names[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return names


def clip_modules(layers: int) -> dict[str, str]:
    """Every module of a CLIP text encoder that has parameters; the original has transformers' names already."""
    names = ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"]
    names += [f"encoder.layers.{i}.{part}" for i in range(layers) for part in _CLIP_LAYER]
    return {f"text_model.{name}": f"text_model.{name}" for name in names}


def open_clip_modules(layers: int, projected: bool) -> dict[str, str]:
    """Every module of an OpenCLIP text encoder that has parameters, once its packed ones are ``_unpacked``."""
    names = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding",
        "ln_final": "text_model.final_layer_norm",
    }
    for i in range(layers):
        names |= _inside(f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", _OPEN_CLIP_LAYER)
    return names | ({"text_projection": "text_projection"} if projected else {})


def _with_text_model(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Files written by old tools lack the ``text_model.`` that others have."""
    return {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in found.items()}


def _unpacked(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's bare parameters as weights of modules: ``in_proj_* [3C, ...]`` become q, k and v of ``[C, ...]``."""
    plain: dict[str, Tensor] = {}
    for name, tensor in found.items():
        module, packed, kind = name.rpartition(".in_proj_")
        if packed:
            if tensor.shape[0] % 3:
                raise ArtifactError(f"{prefix + name!r} is {list(tensor.shape)}; needed: three equal parts")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                plain[f"{module}.{part}_proj.{kind}"] = rows.clone()  # a view would keep all three in memory
        elif name == "text_projection":
            plain["text_projection.weight"] = tensor.T.contiguous()
        else:
            plain[f"{name}.weight" if name == "positional_embedding" else name] = tensor
    return plain


# --- configs ------------------------------------------------------------------------------------------------------

_DOWN, _DOWN_TEXT = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _UP_TEXT = "UpBlock2D", "CrossAttnUpBlock2D"
_SD_SHAPE: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_DOWN_TEXT, _DOWN_TEXT, _DOWN_TEXT, _DOWN],
    "up_block_types": [_UP, _UP_TEXT, _UP_TEXT, _UP_TEXT],
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": _SD_SHAPE | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": _SD_SHAPE
    | {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],  # diffusers' name for the number of heads
        "use_linear_projection": True,
        "upcast_attention": True,  # 2.1 overflows float16 in attention; 2.0 loses nothing by it
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [_DOWN, _DOWN_TEXT, _DOWN_TEXT],
        "up_block_types": [_UP_TEXT, _UP_TEXT, _UP],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_OPEN_CLIP_H = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: the last is not read
    "num_attention_heads": 16,
    "projection_dim": 512,
}
_OPEN_CLIP_BIG_G = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "architectures": ["CLIPTextModelWithProjection"],
}
_TEXT: dict[str, tuple[Mapping[str, Any], ...]] = {
    "sd1": (_CLIP_L,),
    "sd2": (_OPEN_CLIP_H,),
    "sdxl": (_CLIP_L, _OPEN_CLIP_BIG_G),
}


def _image_size(layout: Layout) -> int:
    """The side of the images a family was trained on. SD 2 at 768 is the one that predicts v."""
    if layout.family == "sd2":
        return 768 if layout.prediction == "v_prediction" else 512
    return {"sd1": 512, "sdxl": 1024}[layout.family]


def unet_config(layout: Layout) -> dict[str, Any]:
    """The ``config.json`` of the UNet, under diffusers' names (``UNet2DConditionModel``)."""
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": _image_size(layout) // 8,
        "in_channels": layout.in_channels,
        "out_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        **_copied(_UNETS[layout.family]),
    }


def vae_config(layout: Layout) -> dict[str, Any]:
    """The ``config.json`` of the VAE, under diffusers' names (``AutoencoderKL``)."""
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": _image_size(layout),
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": 0.13025 if layout.family == "sdxl" else 0.18215,
        "force_upcast": layout.family == "sdxl",  # its activations overflow float16
    }


def text_encoder_config(layout: Layout, index: int = 0) -> dict[str, Any]:
    """The ``config.json`` of a text encoder, under transformers' names (``CLIPTextConfig``)."""
    return {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published: transformers then pools at the largest token id, which is the true end
        "pad_token_id": 1,
        **_copied(_TEXT[layout.family][index]),
    }


def scheduler_config(layout: Layout) -> dict[str, Any]:
    """The noise schedule the weights were trained on, as a diffusers scheduler config."""
    return {
        "_class_name": "EulerDiscreteScheduler" if layout.family == "sdxl" else "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": layout.prediction,
        "rescale_betas_zero_snr": layout.zero_terminal_snr,
        # the last trained step, pure noise, must be the first one taken
        "timestep_spacing": "trailing" if layout.zero_terminal_snr else "leading",
        "steps_offset": 1,
        **({} if layout.family == "sdxl" else {"clip_sample": False, "set_alpha_to_one": False}),
    }


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """The table's values, with lists that the caller may change."""
    return {key: list(value) if isinstance(value, list) else value for key, value in values.items()}


def family_modules(families: Iterable[str] = tuple(_UNETS)) -> dict[str, str]:
    """The original names of the UNet modules of several families, which agree wherever they overlap."""
    return {old: new for family in families for old, new in unet_modules(unet_config(Layout(family))).items()}
