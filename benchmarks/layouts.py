"""The UNets people have, as published configs, in full size and scaled down by a divisor of their widths."""

from __future__ import annotations

from typing import Any

SD15: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}  # fmt: skip
SDXL = SD21 | {
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 2048,
    "cross_attention_norm": None, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": False,
}  # fmt: skip
LCM = SD15 | {"time_cond_proj_dim": 256}
INPAINT = SD15 | {"in_channels": 9}
UPSCALER = SD15 | {
    "attention_head_dim": 8, "block_out_channels": [256, 512, 512, 1024], "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3, "in_channels": 7, "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False], "sample_size": 128, "use_linear_projection": True,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
}  # fmt: skip
SSD = SDXL | {"transformer_layers_per_block": [1, 2, 4]}
DDPM_CIFAR: dict[str, Any] = {
    "_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
DDPM_CELEBA = DDPM_CIFAR | {
    "block_out_channels": [128, 128, 256, 256, 512, 512], "sample_size": 256,
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}  # fmt: skip
# the class-conditional networks of ADM and their consistency models
ADM = DDPM_CIFAR | {
    "attention_head_dim": 64, "attn_norm_num_groups": 32, "block_out_channels": [192, 384, 576, 768],
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3, "downsample_padding": 1,
    "downsample_type": "resnet", "flip_sin_to_cos": False, "freq_shift": 0, "layers_per_block": 3, "norm_eps": 1e-05,
    "num_class_embeds": 1000, "resnet_time_scale_shift": "scale_shift", "sample_size": 64,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"], "upsample_type": "resnet",
}  # fmt: skip
ADM_LEARNED = ADM | {"out_channels": 6, "num_class_embeds": None}
LDM = DDPM_CIFAR | {
    "attention_head_dim": 32, "block_out_channels": [224, 448, 672, 896], "downsample_padding": 1,
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3, "flip_sin_to_cos": True, "freq_shift": 0,
    "norm_eps": 1e-05, "sample_size": 64, "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
}  # fmt: skip

LAYOUTS: dict[str, dict[str, Any]] = {
    "SD 1.5": SD15,
    "SD 2.1": SD21,
    "SDXL": SDXL,
    "LCM": LCM,
    "SD inpainting": INPAINT,
    "SD x4 upscaler": UPSCALER,
    "SSD-1B": SSD,
    "DDPM CIFAR-10": DDPM_CIFAR,
    "DDPM CelebA": DDPM_CELEBA,
    "ADM": ADM,
    "ADM, learned variance": ADM_LEARNED,
    "LDM": LDM,
}
PARAMETERS = {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684}  # as published


def scaled(config: dict[str, Any], divisor: int) -> dict[str, Any]:
    """Return the config with all widths divided; the number of blocks, layers and heads stays."""
    small = dict(config)
    for key in ("block_out_channels", "cross_attention_dim", "norm_num_groups", "addition_time_embed_dim",
                "time_cond_proj_dim", "attn_norm_num_groups"):  # fmt: skip
        value = small.get(key)
        if isinstance(value, list):
            small[key] = [v // divisor for v in value]
        elif value:
            small[key] = value // divisor
    if small["_class_name"] == "UNet2DModel" and small["attention_head_dim"]:
        small["attention_head_dim"] //= divisor
    if small.get("addition_embed_type"):
        small["projection_class_embeddings_input_dim"] = 6 * small["addition_time_embed_dim"] + 1280 // divisor
    return small
