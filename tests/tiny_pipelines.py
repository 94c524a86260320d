"""Diffusers pipelines small enough to run in a test: random weights, all parts real."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

from fastdiff.benchmarks.unet_parity import scramble

CROSS, PROJECTED = 16, 12


def tokenizer(folder: Path) -> Any:
    """A tokenizer that knows single characters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits + ",.!"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def text_encoder(words: Any, projected: bool, seed: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=CROSS, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=PROJECTED, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    scramble(model, seed)
    return model


def unet(xl: bool = False, **sizes: Any) -> Any:
    import diffusers

    more: dict[str, Any] = {}
    if xl:
        more = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": 6 * 4 + PROJECTED, "cross_attention_dim": 2 * CROSS,
            "transformer_layers_per_block": [1, 2],
        }  # fmt: skip
    config: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 24), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")[:: -1 if xl else 1],
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")[:: -1 if xl else 1],
        "cross_attention_dim": CROSS, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    model = diffusers.UNet2DConditionModel(**config | more | sizes).eval()
    scramble(model, 5)
    return model


def plain_unet() -> Any:
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()  # fmt: skip
    scramble(model, 7)
    return model


def vae(**sizes: Any) -> Any:
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, **sizes,
    ).eval()  # fmt: skip
    scramble(model, 6)
    return model


def scheduler(name: str = "DDIMScheduler", **options: Any) -> Any:
    import diffusers

    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**usual | options)


def stable_diffusion(folder: Path, sampler: Any = None, **sizes: Any) -> Any:
    """``StableDiffusionPipeline`` of tiny parts."""
    import diffusers

    words = tokenizer(folder / "words")
    return quiet(
        diffusers.StableDiffusionPipeline(
            vae=vae(), text_encoder=text_encoder(words, False, 1), tokenizer=words, unet=unet(**sizes),
            scheduler=sampler or scheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    )  # fmt: skip


def stable_diffusion_xl(folder: Path, sampler: Any = None, **options: Any) -> Any:
    """``StableDiffusionXLPipeline`` of tiny parts."""
    import diffusers

    words = tokenizer(folder / "words")
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025), text_encoder=text_encoder(words, False, 1),
            text_encoder_2=text_encoder(words, True, 2), tokenizer=words, tokenizer_2=words, unet=unet(xl=True),
            scheduler=sampler or scheduler("EulerDiscreteScheduler", steps_offset=1), add_watermarker=False, **options,
        )
    )  # fmt: skip


def controlnet(network: Any, seed: int = 9) -> Any:
    """A ControlNet beside a UNet."""
    import diffusers

    net = diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 8)).eval()
    scramble(net, seed)
    return net


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
