"""The most memory that text-to-image models of full size take, one stage on the device at a time, decoding in tiles.

Weights are of no meaning: none are needed to count bytes. Text encoders are left out: they have left the device when
the UNet comes, and take less than it (SDXL's two 1.64 GB in float16, Stable Diffusion 1.5's one 0.25 GB).

``python -m fastdiff.benchmarks.gpu.memory`` prints the account that needs no GPU: weights, and bytes of tensors alive
at once, each kernel taking its result alone. What cuDNN takes within a call is not in it.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.in_memory import network_of
from fastdiff.benchmarks.gpu.common import Report
from fastdiff.benchmarks.live_bytes import LiveBytes, weights
from fastdiff.integrations.schedulers import from_diffusers_scheduler
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models import single_file
from fastdiff.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet
from fastdiff.sampling.denoiser import Cond
from fastdiff.text_to_image import Parts, TextToImage

DTYPE, TOKENS, STEPS, TILE, GIGABYTE = torch.float16, 77, 2, 64, 1e9
FAMILIES = {"sdxl": "sdxl", "sd15": "sd1"}
BOUNDS = {"sdxl": 8.0, "sd15": 4.0}  # gigabytes, at the model's own size, one image, guided


class Sizes(NamedTuple):
    """A model, as configs."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]


def sizes(name: str) -> Sizes:
    """A published model's."""
    layout = single_file.Layout(FAMILIES[name])
    found = single_file.unet_config, single_file.vae_config, single_file.scheduler_config
    return Sizes(*(config(layout) for config in found))


def networks(model: Sizes, device: str) -> tuple[UNet, AutoencoderKL]:
    """Both networks, as a folder of this precision is loaded: an autoencoder that overflows stays float32."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(model.unet)).to(DTYPE)
        vae = AutoencoderKL(AutoencoderKLConfig.from_dict(model.vae))
        vae = vae if vae.config.force_upcast else vae.to(DTYPE)
    made = [network.eval().requires_grad_(False).to_empty(device=device) for network in (unet, vae)]
    for network in made if device != "meta" else ():
        for parameter in network.parameters():
            parameter.fill_(0.01)
    return made[0], made[1]


def told(unet: UNet, batch: int, device: str) -> dict[str, Tensor]:
    """The conditioning of a batch."""
    config = unet.config
    found = {"encoder_hidden_states": torch.zeros(batch, TOKENS, config.cross_attention_dim, device=device)}
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["text_embeds"] = torch.zeros(batch, pooled, device=device)
        found["time_ids"] = torch.zeros(batch, 6, device=device)
    return found


def kernels_alone() -> Ops:
    """Ops that take the memory of their result and no other, as the Triton kernels and fused attention do."""

    def like(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(x)

    def half(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    return REFERENCE._replace(group_norm_silu=like, attention=like, layer_norm=like, geglu=half)


@torch.no_grad()
def account(model: Sizes, device: str = "meta") -> dict[str, int]:
    """Bytes of each stage: the weights, and with them the most that is alive at once."""
    unet, vae = networks(model, device)
    unet.ops = vae.ops = kernels_alone()
    network, side = network_of(unet, "eager"), unet.config.sample_size or 64
    x = torch.zeros(2, unet.config.in_channels, side, side, device=device)  # one image and what it is guided away from
    with LiveBytes() as stage:
        times = torch.zeros(2, STEPS, 2, device=device)
        prepared = network.prepare(Cond(extra=told(unet, 2, device)), times)
        network(x, torch.zeros(2, dtype=torch.int64, device=device), prepared)
    found = {"unet_weights": weights([unet]), "unet_peak": weights([unet]) + stage.peak}
    with LiveBytes() as stage:
        vae.to_images(x[:1, : vae.latent_channels].to(next(vae.parameters()).dtype), TILE)
    return found | {"vae_weights": weights([vae]), "vae_peak": weights([vae]) + stage.peak}


def pipeline(model: Sizes, device: torch.device) -> TextToImage:
    """The whole of it, as a user of a small card sets it up."""
    unet, vae = networks(model, "cpu")
    xl = unet.config.addition_embed_type is not None
    parts = Parts(unet, vae, (), from_diffusers_scheduler(model.scheduler), xl=xl)
    pipe = TextToImage(parts, torch.device("cpu"))
    pipe.enable_model_cpu_offload(device)
    pipe.enable_vae_tiling(TILE)
    return pipe


def measure(name: str, device: torch.device) -> dict[str, Any]:
    """Peak of a guided call for one image, in gigabytes, beside the account."""
    model = sizes(name)
    pipe = pipeline(model, device)
    given = told(pipe.parts.unet, 1, "cpu")
    embeds = {"prompt_embeds": given["encoder_hidden_states"], "negative_prompt_embeds": given["encoder_hidden_states"]}
    if "text_embeds" in given:
        embeds |= {"pooled_prompt_embeds": given["text_embeds"], "negative_pooled_prompt_embeds": given["text_embeds"]}
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    image = pipe(**embeds, num_inference_steps=STEPS, guidance_scale=5.0, seed=0, output_type="pt").images
    return {
        "pixels": list(image.shape[2:]),
        "peak_gb": torch.cuda.max_memory_allocated(device) / GIGABYTE if cuda else None,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / GIGABYTE if cuda else None,
        "account_gb": {stage: size / GIGABYTE for stage, size in account(model).items()},
    }


def part(report: Report, device: torch.device) -> None:
    """Every model."""
    for name in FAMILIES:
        report.add({"model": name, "dtype": str(DTYPE), "tile": TILE}, functools.partial(measure, name, device))


if __name__ == "__main__":
    found = {name: account(sizes(name)) for name in FAMILIES}
    print(json.dumps({name: {k: round(v / GIGABYTE, 3) for k, v in stages.items()} for name, stages in found.items()}))
