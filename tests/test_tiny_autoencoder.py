"""Tiny autoencoders are diffusers' AutoencoderTiny and the original TAESD: same names, same numbers, exact tiles.

Tests of published weights and real images need ``FASTDIFF_WEIGHTS``, a folder with ``taef2_encoder.safetensors`` and
``taef2_decoder.safetensors``, and ``FASTDIFF_CIFAR10``, an archive with ``test_images``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from autoencoders import NEEDS_DIFFUSERS, RELATIVE, relative_error, rms_error, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff.benchmarks.autoencoder_quality import DECODER, ENCODER, mosaic, psnr, round_trip
from fastdiff.benchmarks.unet_parity import scramble
from fastdiff.errors import ArtifactError, ShapeError
from fastdiff.models.autoencoder_files import load_autoencoder, load_tiny_chains
from fastdiff.models.tiny_autoencoder import AutoencoderTiny, AutoencoderTinyConfig, chain_views
from fastdiff.models.weights import load_strictly

pytestmark = pytest.mark.fast
TINY: dict[str, dict[str, Any]] = {
    "taesd": {},
    "taesd3": {"latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.25},
    "small": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (0, 2),
        "num_decoder_blocks": (2, 1),
        "act_fn": "silu",
        "latent_magnitude": 2,
        "latent_shift": 0.4,
    },
    "threefold": {
        "upsampling_scaling_factor": 3,
        "num_decoder_blocks": (1, 1),
        "decoder_block_out_channels": (8, 8),
        "in_channels": 4,
        "out_channels": 3,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_saved_tiny_autoencoder_of_diffusers_gives_the_same_numbers(name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    theirs = diffusers.AutoencoderTiny(**TINY[name]).eval()
    ours = load_autoencoder(saved(theirs, tmp_path))
    assert isinstance(ours, AutoencoderTiny)
    images = torch.rand(2, ours.in_channels, 3 * ours.shrink, 5 * ours.shrink) * 2 - 1
    raw = theirs.encode(images).latents
    assert relative_error(ours.encode(images), raw) <= RELATIVE
    latents = 4 * torch.randn(2, ours.latent_channels, 3, 5)  # some beyond the bend
    wanted = theirs.decode(latents).sample
    assert wanted.shape[2] == 3 * ours.grow and relative_error(ours.decode(latents), wanted) <= RELATIVE
    assert torch.equal(ours.scale_latents(latents), theirs.scale_latents(latents))
    assert torch.allclose(ours.unscale_latents(latents), theirs.unscale_latents(latents), atol=1e-6)
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    assert relative_error(ours.to_latents(images), (raw - shift) * scale) <= RELATIVE
    assert relative_error(ours.to_images(latents), theirs.decode(latents / scale + shift).sample) <= RELATIVE
    # the same bytes, but for values at the very edge of two
    assert rms_error(ours(images), theirs(images).sample) < 1e-3


@torch.no_grad()
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    left=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    right=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    widths=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    latents=st.integers(1, 9),
    act_fn=st.sampled_from(["relu", "silu", "swish", "mish", "gelu"]),
)
def test_any_tiny_config_equals_diffusers(left, right, widths, latents, act_fn):
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    torch.manual_seed(2)
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=[widths[0]] * len(left),
        decoder_block_out_channels=[widths[1]] * len(right),
        num_encoder_blocks=left,
        num_decoder_blocks=right,
        latent_channels=latents,
        act_fn=act_fn,
    ).eval()
    ours = AutoencoderTiny(AutoencoderTinyConfig.from_dict(theirs.config))
    load_strictly(ours, theirs.state_dict(), "drawn")
    images, z = torch.rand(1, 3, 2 * ours.shrink, ours.shrink) * 2 - 1, torch.randn(1, latents, 2, 3)
    assert relative_error(ours.encode(images), theirs.encode(images).latents) <= RELATIVE
    assert relative_error(ours.decode(z), theirs.decode(z).sample) <= RELATIVE


TINY_REFUSED = [
    ("_class_name", "AutoencoderKL"),
    ("act_fn", "tanh"),
    ("act_fn", ["relu"]),
    ("upsample_fn", "bilinear"),
    ("force_upcast", True),
    ("frobnicate", 1),
    ("latent_channels", 0),
    ("in_channels", "3"),
    ("out_channels", 10**9),
    ("upsampling_scaling_factor", 2.0),
    ("num_encoder_blocks", []),
    ("num_encoder_blocks", [1, 3, 3, -1]),
    ("num_decoder_blocks", [1, 3, 3, 10**6]),
    ("num_decoder_blocks", 3),
    ("encoder_block_out_channels", [64, 64, 64, 32]),
    ("encoder_block_out_channels", [64]),
    ("decoder_block_out_channels", [10**9] * 4),
    ("latent_magnitude", 0),
    ("latent_shift", float("nan")),
    ("scaling_factor", -1.0),
    ("shift_factor", None),
    ("encoder_pools", [True]),
    ("decoder_pools", [1, 0, 0, 0]),
]


@pytest.mark.parametrize(("key", "value"), TINY_REFUSED, ids=str)
def test_a_tiny_config_we_cannot_honour_is_refused_by_name(key, value):
    with pytest.raises(ArtifactError, match=key) as caught:
        AutoencoderTinyConfig.from_dict({key: value})
    assert "\n" not in str(caught.value)


def test_tiny_shapes_that_do_not_fit_are_refused():
    network = AutoencoderTiny(AutoencoderTinyConfig())
    with pytest.raises(ShapeError, match="multiples of 8"):
        network.encode(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ShapeError, match="latents"):
        network.decode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ShapeError, match="tile 18 with overlap 18"):
        network.decode_tiled(torch.zeros(1, 4, 40, 40), 18)


SMALL_TAEF2 = AutoencoderTinyConfig(
    encoder_block_out_channels=(8,) * 4,
    decoder_block_out_channels=(12,) * 4,
    latent_channels=6,
    encoder_pools=(False, False, False, True),
    decoder_pools=(True, False, False, False),
)


def make_tiny(config: AutoencoderTinyConfig = SMALL_TAEF2) -> AutoencoderTiny:
    network = AutoencoderTiny(config).eval()
    scramble(network)
    return network


def chains(network: AutoencoderTiny) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    left, right = (dict(view.state_dict()) for view in chain_views(network))
    return left, right


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [SMALL_TAEF2, AutoencoderTinyConfig(num_encoder_blocks=(0, 1, 0, 2))], ids=["pools", ""]
)
def test_the_original_layout_tells_its_sizes(config, tmp_path):
    network = make_tiny(config)
    left, right = chains(network)
    assert "0.weight" in left and "0.weight" not in right and {"1.weight", "1.bias"} <= right.keys()
    save_file(left, tmp_path / "e.safetensors")
    save_file(right, tmp_path / "d.safetensors")
    loaded = load_tiny_chains(tmp_path / "e.safetensors", tmp_path / "d.safetensors")
    assert loaded.config == config and loaded.state_dict().keys() == network.state_dict().keys()
    images, latents = torch.rand(1, 3, 16, 24), torch.randn(1, config.latent_channels, 3, 2)
    assert relative_error(loaded.encode(images), network.encode(images)) <= RELATIVE
    assert relative_error(loaded.decode(latents), network.decode(latents)) <= RELATIVE


CHAINS_REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Any]]] = {
    "foreign name": ("layers.0.weight", lambda e, d: e.update({"layers.0.weight": torch.zeros(1)})),
    "far place": ("1000.weight", lambda e, d: e.update({"1000.weight": torch.zeros(1)})),
    "projected residual": ("1.skip.weight", lambda e, d: e.update({"1.skip.weight": torch.zeros(1)})),
    "gap": ("layer 3 is nothing", lambda e, d: [e.pop(name) for name in list(e) if name.startswith("3.")]),
    "no bias at the start": (r"layer 0 is conv without bias \['0.weight'\]", lambda e, d: e.pop("0.bias")),
    "bias after enlarging": (r"layer 7 is conv .*'7.bias'", lambda e, d: d.update({"7.bias": torch.zeros(12)})),
    "no bend": ("layer 0 is conv", lambda e, d: d.update({"0.weight": torch.zeros(1), "0.bias": torch.zeros(1)})),
    "after the end": (
        "layer 20 is conv",
        lambda e, d: d.update({"20.weight": torch.zeros(1), "20.bias": torch.zeros(1)}),
    ),
    "cut off": ("layers stop", lambda e, d: (d.pop("19.weight"), d.pop("19.bias"))),
    "empty": ("layers stop|layer 0 is nothing", lambda e, d: d.clear()),
    "one pool of three": (
        "layer 12 is block",
        lambda e, d: [e.pop(name) for name in list(e) if name.startswith("12.pool")],
    ),
    "flat": ("'0.weight' is", lambda e, d: e.update({"0.weight": torch.zeros(3)})),
    "other latents": ("gives 5 channels", lambda e, d: e.update({"14.weight": torch.zeros(5, 8, 3, 3)})),
    "part of a block": ("1.conv.2.weight", lambda e, d: e.pop("1.conv.2.weight")),
    "part of a pool": ("11.pool.1.bias", lambda e, d: e.pop("11.pool.1.bias")),
    "odd width": ("5.conv.0.weight", lambda e, d: e.update({"5.conv.0.weight": torch.zeros(8, 9, 3, 3)})),
    "large kernel": ("1.weight", lambda e, d: d.update({"1.weight": torch.zeros(12, 6, 5, 5)})),
    "wide pool": ("3.pool.0.weight", lambda e, d: d.update({"3.pool.0.weight": torch.zeros(24, 12, 1, 1)})),
    "whole numbers": ("1.bias", lambda e, d: d.update({"1.bias": torch.zeros(12, dtype=torch.int32)})),
}


@pytest.mark.parametrize("case", CHAINS_REFUSED)
def test_a_chain_that_does_not_fit_is_refused_by_name(case, tmp_path):
    match, spoil = CHAINS_REFUSED[case]
    left, right = chains(make_tiny())
    spoil(left, right)
    save_file(left, tmp_path / "e.safetensors")
    save_file(right, tmp_path / "d.safetensors")
    with pytest.raises(ArtifactError, match=match) as caught:
        load_tiny_chains(tmp_path / "e.safetensors", tmp_path / "d.safetensors")
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("pools", [False, True])
def test_tiles_of_a_tiny_autoencoder_are_exact(pools):
    sizes = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    network = make_tiny(SMALL_TAEF2 if pools else AutoencoderTinyConfig(**sizes))
    assert network.exact_overlap == 18
    latents, images = torch.randn(1, network.latent_channels, 47, 20), torch.rand(1, 3, 8 * 20, 8 * 47) * 2 - 1
    whole, raw = network.decode(latents), network.encode(images)
    assert relative_error(network.decode_tiled(latents, 24), whole) <= RELATIVE
    assert relative_error(network.encode_tiled(images, 24), raw) <= RELATIVE
    assert relative_error(network.decode_tiled(latents, 24, 4), whole) > RELATIVE  # so it was cut


@torch.no_grad()
def test_the_radius_is_how_far_a_pixel_looks():
    network = make_tiny(AutoencoderTinyConfig(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4))
    x = torch.randn(1, 4, 30, 30).abs()
    changed = x.clone()
    changed[..., 15, 15] += 10
    differs = (network._decode_tile(changed) != network._decode_tile(x)).any(1)[0].nonzero() // 8
    reach = int((differs - 15).abs().max())
    assert 1 <= reach <= network.decode_radius == 9


def test_a_pool_above_the_size_of_the_latents_allows_no_exact_tiles():
    network = make_tiny(AutoencoderTinyConfig(decoder_pools=(False, True, False, False)))
    assert network.decode_radius is None and network.exact_overlap is None
    with torch.no_grad():
        assert network.decode_tiled(torch.randn(1, 4, 20, 3), 18).shape == (1, 3, 160, 24)


# Published weights and real images


def material(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"needs published material: {variable} is not set")
    return Path(path)


def taef2() -> tuple[AutoencoderTiny, dict[str, Tensor], dict[str, Tensor]]:
    folder = material("FASTDIFF_WEIGHTS")
    left, right = (load_file(folder / name) for name in (ENCODER, DECODER))
    return load_tiny_chains(folder / ENCODER, folder / DECODER), left, right


def by_hand(tensors: dict[str, Tensor], x: Tensor, last: int, quiet: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """The chain as its author describes it, place by place; ``quiet`` are the places without tensors."""
    t = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
    for i in range(last + 1):
        if i in quiet:
            x = quiet[i](x)
        elif f"{i}.conv.0.weight" in t:
            if f"{i}.pool.0.weight" in t:
                h = F.group_norm(
                    F.conv2d(x, t[f"{i}.pool.0.weight"]), 4, t[f"{i}.pool.1.weight"], t[f"{i}.pool.1.bias"]
                )
                x = x + F.conv2d(F.relu(h), t[f"{i}.pool.3.weight"])
            h = x
            for j in (0, 2, 4):
                h = F.conv2d(F.relu(h) if j else h, t[f"{i}.conv.{j}.weight"], t[f"{i}.conv.{j}.bias"], padding=1)
            x = F.relu(h + x)
        else:
            stride = 2 if last == 14 and f"{i}.bias" not in t else 1  # the encoder's convolutions without bias
            x = F.conv2d(x, t[f"{i}.weight"], t.get(f"{i}.bias"), stride=stride, padding=1)
    return x


@torch.no_grad()
def test_taef2_is_the_network_its_author_describes():
    network, left, right = taef2()
    config = network.config
    assert config.latent_channels == 32 and config.encoder_pools == (False, False, False, True)
    assert config.decoder_pools == (True, False, False, False) and config.num_decoder_blocks == (3, 3, 3, 1)
    images, latents = torch.rand(1, 3, 24, 40), 2 * torch.randn(1, 32, 3, 5)

    def enlarge(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)

    def bend(x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)

    quiet = {0: bend, 2: F.relu, 6: enlarge, 11: enlarge, 16: enlarge}
    assert relative_error(network.encode(2 * images - 1), by_hand(left, images, 14, {})) <= RELATIVE
    assert relative_error((network.decode(latents) + 1) / 2, by_hand(right, latents, 19, quiet)) <= RELATIVE


def test_taef2_gives_real_images_back_as_measured_before():
    figures = round_trip(material("FASTDIFF_WEIGHTS"), material("FASTDIFF_CIFAR10"))
    assert {name: round(value, 3) for name, value in figures.items()} == {
        "psnr_db": 24.944,
        "latent_mean": 0.071,
        "latent_std": 0.91,
    }


@torch.no_grad()
def test_tiles_of_taef2_are_exact_and_those_of_diffusers_are_not():
    network, data = taef2()[0], material("FASTDIFF_CIFAR10")
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network.decode(x)

    theirs = diffusers.AutoencoderTiny()
    theirs.decoder, theirs.tile_latent_min_size, theirs.tile_overlap_factor = Whole(), 22, 0.4
    images = F.interpolate(mosaic(data), size=(8 * 26, 8 * 20), mode="bicubic").clamp(0, 1) * 2 - 1
    latents = network.encode(images)
    whole = network.decode(latents)
    assert relative_error(network.encode_tiled(images, 22), latents) <= RELATIVE
    assert relative_error(network.decode_tiled(latents, 22), whole) <= RELATIVE
    cut = rms_error(network.decode_tiled(latents, 22, 8), whole)
    assert 0 < cut < 0.01 < rms_error(theirs._tiled_decode(latents), whole)


def test_the_mosaic_is_laid_out_row_by_row(tmp_path):
    import numpy as np

    images = np.arange(18, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    np.savez(tmp_path / "images.npz", test_images=images)
    picture = mosaic(tmp_path / "images.npz")
    assert picture.shape == (1, 3, 8, 12)
    assert torch.equal(picture[0, 1, ::2, ::3] * 255, torch.arange(16.0).view(4, 4))
    assert psnr(torch.full((4,), 0.6), torch.full((4,), 0.5)) == pytest.approx(20, abs=1e-4)
