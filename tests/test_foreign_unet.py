"""Bring your own network: a published one of a foreign design walks through every sampler.

Its weights are not ours to ship: FASTDIFF_WEIGHTS names the folder they lie in, FASTDIFF_MNIST the digits.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_unet import ForeignUNet

import fastdiff
from fastdiff.models.files import read_tensors
from fastdiff.sampling.path import linear_betas


@pytest.fixture(scope="module")
def network() -> ForeignUNet:
    folder = os.environ.get("FASTDIFF_WEIGHTS")
    if not folder:
        pytest.skip("FASTDIFF_WEIGHTS does not name a folder with ddpm_mnist_small.safetensors")
    return ForeignUNet(read_tensors(Path(folder) / "ddpm_mnist_small.safetensors"))


def digits(count: int) -> torch.Tensor:
    file = os.environ.get("FASTDIFF_MNIST")
    if not file:
        pytest.skip("FASTDIFF_MNIST does not name an .npz with test_images")
    with np.load(file, allow_pickle=False) as arrays:
        return (torch.from_numpy(arrays["test_images"][:count]).float()[:, None] / 255 - 0.5) * 2


@torch.no_grad()
def test_it_predicts_noise_as_well_as_was_measured(network):
    """The published figures: 0.028 over uniform times, and by time on 64 digits."""
    path, draw = linear_betas(), torch.Generator().manual_seed(0)

    def error(images, times):
        levels = torch.tensor([path.alpha_sigma(float(t) + 1) for t in times])[:, :, None, None, None].unbind(1)
        z = torch.randn(images.shape, generator=draw)
        return float((network(levels[0] * images + levels[1] * z, times) - z).square().mean())

    assert error(digits(512), torch.randint(1000, (512,), generator=draw)) == pytest.approx(0.028, abs=0.004)
    measured = {1: 0.249, 10: 0.158, 100: 0.068, 300: 0.032, 500: 0.016, 700: 0.005, 900: 0.003}
    for t, wanted in measured.items():
        assert error(digits(64), torch.full((64,), t)) == pytest.approx(wanted, rel=0.15, abs=0.001)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "unipc", "heun"])
def test_it_runs_through_fastdiff_sample(network, sampler):
    options = {"path": "linear", "prediction": "eps", "num_inference_steps": 20, "clip": 1.0, "seed": 3}
    images = digits(8)
    got = fastdiff.sample(network, (8, 1, 28, 28), sampler=sampler, image=images, strength=0.3, **options)
    both = torch.stack([got.flatten(), images.flatten()])
    # a weak generator from noise alone, but digits noised a third of the way come back as themselves
    assert float(torch.corrcoef(both)[0, 1]) > 0.8


@torch.no_grad()
def test_the_walk_is_diffusers_own(network):
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
    scheduler = diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    x = start = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(4)), t, x).prev_sample
    sampler = fastdiff.from_diffusers_scheduler(scheduler)
    got = fastdiff.sample(network, (4, 1, 28, 28), sampler=sampler, num_inference_steps=20, latents=start)
    assert float((got - x).abs().max()) <= 1e-4
