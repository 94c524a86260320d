"""One evaluation of every layout: plain torch, torch.compile and the captured plan, against float32.

Weights are random: no trained ones are needed to time a network, and errors are relative to the same weights.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.in_memory import network_of
from fastdiff.benchmarks.environment import relative_error, repeated_ms, summary
from fastdiff.benchmarks.gpu.common import Report, capture
from fastdiff.benchmarks.layouts import DDPM_CIFAR, SD15, SDXL
from fastdiff.kernels import REFERENCE, triton_ops
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet
from fastdiff.sampling.denoiser import Cond

# layout, pixels of its latents, batches
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "ddpm-cifar": (DDPM_CIFAR, 32, (1, 8)),
    "sd15": (SD15, 64, (1, 2, 8)),
    "sdxl": (SDXL, 128, (2, 8)),
}
DTYPE, TOKENS = torch.float16, 77
PLAIN = ("eager", "eager, captured", "fastdiff")
COMPILED = "torch.compile"


class Inputs(NamedTuple):
    """What one evaluation is given, float32."""

    x: Tensor  # [B, C, H, W]
    timestep: Tensor  # [B]
    told: dict[str, Tensor]  # the conditioning, under the names of ``UNet.forward``


@functools.lru_cache(maxsize=1)  # two of them would not fit beside each other on every card
def network(layout: str, device: torch.device) -> UNet:
    """A layout with random weights, float32, channels-last, plain ops."""
    torch.manual_seed(0)
    with device:
        unet = UNet(UNetConfig.from_dict(CASES[layout][0])).eval().requires_grad_(False)
    return unet.to(memory_format=torch.channels_last)


def inputs(unet: UNet, size: int, batch: int, device: torch.device) -> Inputs:
    """Inputs of one evaluation; the same for the same batch."""
    draw, config = torch.Generator().manual_seed(batch), unet.config
    told = {}
    if config.conditional:
        told["encoder_hidden_states"] = torch.randn(batch, TOKENS, config.cross_attention_dim, generator=draw)
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        told["text_embeds"] = torch.randn(batch, pooled, generator=draw)
        told["time_ids"] = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).expand(batch, -1)
    x = torch.randn(batch, config.in_channels, size, size, generator=draw)
    given = Inputs(x, torch.linspace(900.0, 100.0, batch), told)
    return Inputs(x.to(device), given.timestep.to(device), {name: value.to(device) for name, value in told.items()})


def evaluation(unet: UNet, given: Inputs, by: str, device: torch.device) -> Callable[[], Tensor]:
    """One evaluation in half precision, ready to be timed.

    ``eager`` and ``torch.compile`` run the whole forward pass, as diffusers' pipelines do at every step; ``fastdiff``
    embeds times and text once for a whole run, so only its trunk is timed.
    """
    half = copy.deepcopy(unet).to(DTYPE)
    told = {name: value.to(DTYPE) for name, value in given.told.items()}
    x = given.x.to(DTYPE, memory_format=torch.channels_last)
    if by == "fastdiff":
        half.ops = triton_ops()
        plan = network_of(half, "captured")
        times = given.timestep[:, None, None].expand(-1, 1, 2)
        prepared = plan.prepare(Cond(extra=told or None), times)
        index = torch.zeros(len(x), dtype=torch.int64, device=device)
        return lambda: plan(x, index, prepared)
    half.ops = REFERENCE
    run = half
    if by == COMPILED:
        torch.compiler.reset()
        run = torch.compile(half, mode="max-autotune", dynamic=False)

    def call() -> Tensor:
        return run(x, given.timestep, **told)

    return capture(call, device) if by == "eager, captured" else call


def measure(layout: str, batch: int, by: str, device: torch.device) -> dict[str, Any]:
    """Time and error of one evaluation."""
    unet = network(layout, device)
    given = inputs(unet, CASES[layout][1], batch, device)
    truth = unet(given.x, given.timestep, **given.told)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    call = evaluation(unet, given, by, device)
    found = relative_error(call(), truth)
    taken = summary(repeated_ms(call, device, rounds=100, limit_s=1.5))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return taken | {"error": found, "peak_bytes_beside_float32": peak}


def add(report: Report, device: torch.device, ways: tuple[str, ...]) -> None:
    """Measure every layout and batch by some ways."""
    for layout, (_, _, batches) in CASES.items():
        for batch in batches:
            for by in ways:
                label = {"layout": layout, "batch": batch, "dtype": str(DTYPE), "by": by}
                report.add(label, functools.partial(measure, layout, batch, by, device))


def part(report: Report, device: torch.device) -> None:
    """All but what has to be compiled."""
    add(report, device, PLAIN)


def compile_part(report: Report, device: torch.device) -> None:
    """By ``torch.compile``: a part of its own, since compiling may outlast any limit."""
    add(report, device, (COMPILED,))
