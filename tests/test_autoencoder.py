"""The autoencoder is diffusers' AutoencoderKL: same names, same numbers; tiles lose little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from autoencoders import NEEDS_DIFFUSERS, RELATIVE, relative_error, rms_error, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import assert_no_worse_than
from torch import Tensor, nn

from fastdiff.benchmarks.unet_parity import scramble
from fastdiff.errors import ArtifactError, ShapeError
from fastdiff.kernels import REFERENCE
from fastdiff.models.autoencoder import AutoencoderKL, AutoencoderKLConfig, Moments, rename_old_attention
from fastdiff.models.autoencoder_files import load_autoencoder
from fastdiff.models.tiling import run_tiled, tile_starts, tile_weights
from fastdiff.models.weights import load_strictly

pytestmark = pytest.mark.fast


def levels(count: int, attend: bool = False) -> dict[str, Any]:
    prefix = "Attn" if attend else ""
    return {
        "down_block_types": (prefix + "DownEncoderBlock2D",) * count,
        "up_block_types": (prefix + "UpDecoderBlock2D",) * count,
    }


SD: dict[str, Any] = {**levels(4), "block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "norm_num_groups": 4}
KL: dict[str, dict[str, Any]] = {
    "one_level": {"block_out_channels": (8,), "norm_num_groups": 2},
    "sd": SD,
    "sdxl": {**SD, "scaling_factor": 0.13025, "sample_size": 64},
    "sd3": {**SD, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
            "use_post_quant_conv": False},
    "one_quant_conv": {**SD, "use_quant_conv": False, "force_upcast": False},
    "means": {**SD, "latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 3.0]},
    "attention_everywhere": {**SD, **levels(2, True), "block_out_channels": (8, 24), "layers_per_block": 1},
    "no_attention": {**SD, "mid_block_add_attention": False},
    "other_channels": {**SD, "in_channels": 4, "out_channels": 2},
}  # fmt: skip


def make_kl(**sizes: Any) -> AutoencoderKL:
    network = AutoencoderKL(AutoencoderKLConfig.from_dict({**SD, **sizes})).eval()
    scramble(network)
    return network


# AutoencoderKL


@torch.no_grad()
@pytest.mark.parametrize("name", KL)
def test_a_saved_autoencoder_of_diffusers_gives_the_same_moments_and_images(name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    theirs = diffusers.AutoencoderKL(**KL[name]).eval()
    ours = load_autoencoder(saved(theirs, tmp_path))
    assert isinstance(ours, AutoencoderKL) and ours.decoder.conv_in.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    factor = ours.shrink
    images = torch.rand(2, ours.in_channels, 3 * factor, 5 * factor) * 2 - 1  # odd sizes of the latents
    wanted, got = theirs.encode(images).latent_dist, ours.encode(images)
    assert wanted.mean.std() > 0.05
    assert relative_error(got.mean, wanted.mean) <= RELATIVE
    assert relative_error(got.logvar, wanted.logvar) <= RELATIVE
    noise = torch.randn(got.mean.shape, generator=torch.Generator().manual_seed(3))
    drawn = wanted.sample(torch.Generator().manual_seed(3))
    assert relative_error(got.sample(noise), drawn) <= RELATIVE
    assert torch.equal(got.mode(), got.mean)
    latents = torch.randn(2, ours.latent_channels, 3, 5)
    wanted = theirs.decode(latents).sample
    assert wanted.shape[1:] == (KL[name].get("out_channels", 3), 3 * factor, 5 * factor) and wanted.std() > 0.05
    assert relative_error(ours.decode(latents), wanted) <= RELATIVE
    if ours.in_channels == 3:
        assert relative_error(ours(images), theirs(images).sample) <= RELATIVE


@st.composite
def kl_configs(draw: Callable[..., Any]) -> dict[str, Any]:
    count, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    return {
        **levels(count, draw(st.booleans())),
        "block_out_channels": [4 * draw(st.integers(1, 4)) for _ in range(count)],
        "layers_per_block": draw(st.integers(1, 3)),
        "latent_channels": draw(st.integers(1, 5)),
        "norm_num_groups": groups,
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
        "mid_block_add_attention": draw(st.booleans()),
        "act_fn": draw(st.sampled_from(["silu", "swish"])),
    }


@torch.no_grad()
@settings(max_examples=12, deadline=None, derandomize=True)
@given(config=kl_configs(), height=st.integers(1, 4), width=st.integers(1, 4))
def test_any_config_is_as_accurate_as_diffusers(config, height, width):
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    torch.manual_seed(1)
    theirs = diffusers.AutoencoderKL(**config).eval()
    scramble(theirs)
    ours = AutoencoderKL(AutoencoderKLConfig.from_dict(theirs.config))
    load_strictly(ours, theirs.state_dict(), "drawn")
    images = torch.rand(1, 3, height * ours.shrink, width * ours.shrink) * 2 - 1
    latents = torch.randn(1, ours.latent_channels, height, width)
    got = ours.encode(images).mean, ours.decode(latents)
    plain = theirs.encode(images).latent_dist.mean, theirs.decode(latents).sample
    theirs = theirs.double()
    truth = theirs.encode(images.double()).latent_dist.mean, theirs.decode(latents.double()).sample
    for our, their, true in zip(got, plain, truth, strict=True):
        if relative_error(our, their) > RELATIVE:
            assert_no_worse_than(our, their, true)


@torch.no_grad()
def test_latents_are_scaled_as_pipelines_do_it():
    images, noise = torch.rand(1, 3, 16, 8) * 2 - 1, torch.randn(1, 4, 2, 1)
    for sizes in ({"scaling_factor": 0.13025}, {"scaling_factor": 1.5, "shift_factor": 0.6}):
        network = make_kl(**sizes)
        scale, shift = sizes["scaling_factor"], sizes.get("shift_factor", 0.0)
        moments = network.encode(images)
        latents = network.to_latents(images, noise)
        assert torch.allclose(latents, (moments.sample(noise) - shift) * scale, rtol=1e-5, atol=1e-6)
        assert torch.allclose(network.to_latents(images), (moments.mean - shift) * scale, rtol=1e-5, atol=1e-6)
        assert relative_error(network.to_images(latents), network.decode(latents / scale + shift)) <= RELATIVE
    network = make_kl(scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    raw = network.encode(images).mean
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 8.0]))
    latents = network.to_latents(images)
    assert torch.allclose(latents, (raw - mean) * 0.5 / std, rtol=1e-5, atol=1e-6)
    assert torch.allclose(network.denormalise(latents), raw, rtol=1e-5, atol=1e-5)


def test_the_log_variance_is_bounded():
    moments = AutoencoderKL._moments(torch.tensor([1.0, -1e9, 2.0, 1e9]).view(2, 2, 1, 1))
    assert moments.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.isfinite(moments.sample(torch.ones(2, 1, 1, 1))).all()


def test_the_full_size_is_that_of_stable_diffusion():
    sizes = {**levels(4), "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512}
    with torch.device("meta"):
        network = AutoencoderKL(AutoencoderKLConfig.from_dict({"_class_name": "AutoencoderKL", **sizes}))
        images = network.decode(torch.empty(1, 4, 64, 96))
    assert sum(parameter.numel() for parameter in network.parameters()) == 83_653_863
    assert images.shape == (1, 3, 512, 768) and network.encode(images).mean.shape == (1, 4, 64, 96)


@torch.no_grad()
def test_norms_and_attention_are_the_injected_ones():
    counts = {"norm": 0, "attention": 0}

    def norm(*args: Any, **options: Any) -> Tensor:
        counts["norm"] += 1
        return REFERENCE.group_norm_silu(*args, **options)

    def attention(*args: Any) -> Tensor:
        counts["attention"] += 1
        return REFERENCE.attention(*args)

    network = make_kl()
    network.ops = REFERENCE._replace(group_norm_silu=norm, attention=attention)
    network.decode(torch.randn(1, 4, 2, 2))
    norms = sum(isinstance(module, nn.GroupNorm) for module in network.decoder.modules())
    assert counts == {"norm": norms, "attention": 1}


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = tensor
    return renamed


def test_early_files_with_old_names_of_attention_load(tmp_path):
    network = make_kl()
    tensors = dict(network.state_dict())
    early = old_names(tensors)
    assert len(early.keys() - tensors.keys()) == 16  # four projections with bias, on both sides
    assert rename_old_attention(early).keys() == tensors.keys() == rename_old_attention(tensors).keys()
    save_file(
        {name: tensor.contiguous() for name, tensor in early.items()}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "config.json").write_text(
        '{"down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],'
        '"up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],'
        '"block_out_channels": [8, 16, 16, 16], "layers_per_block": 2, "norm_num_groups": 4, "act_fn": "silu"}'
    )
    loaded = load_autoencoder(tmp_path)
    latents = torch.randn(1, 4, 2, 3)
    with torch.no_grad():
        assert relative_error(loaded.decode(latents), network.decode(latents)) <= RELATIVE
    both = "decoder.mid_block.attentions.0.to_q.weight"
    for order in (early | {both: tensors[both]}, {both: tensors[both]} | early):
        with pytest.raises(ArtifactError, match=both):
            rename_old_attention(order)


def test_loading_is_strict_and_names_the_tensor():
    network, tensors = make_kl(), dict(make_kl().state_dict())
    name = "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"
    for changed in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name + ".extra": torch.zeros(1)},
        tensors | {name: torch.zeros(3, 3)},
        tensors | {name: torch.zeros(tensors[name].shape, dtype=torch.int64)},
    ):
        with pytest.raises(ArtifactError, match=name):
            load_strictly(network, changed, "file")


def test_half_precision_keeps_its_dtype_whole_and_in_tiles(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    network = load_autoencoder(saved(diffusers.AutoencoderKL(**SD), tmp_path), torch.bfloat16)
    latents = torch.randn(1, 4, 6, 3).bfloat16()
    for images in (network.decode(latents), network.decode_tiled(latents, 4, 1)):
        assert images.dtype == torch.bfloat16 and torch.isfinite(images).all()
    with torch.no_grad():
        assert rms_error(network.decode(latents).float(), network.float().decode(latents.float())) < 0.1


KL_REFUSED = [
    ("_class_name", "AutoencoderKLWan"),
    ("act_fn", "relu"),
    ("frobnicate", 1),
    ("down_block_types", ["DownBlock2D"] * 4),
    ("down_block_types", ["DownEncoderBlock2D"]),
    ("up_block_types", "UpDecoderBlock2D"),
    ("up_block_types", [["UpDecoderBlock2D"]] * 4),
    ("block_out_channels", []),
    ("block_out_channels", [8, 16, 16, 18]),
    ("block_out_channels", [8, 16, 16, 10**12]),
    ("block_out_channels", 8),
    ("layers_per_block", 0),
    ("layers_per_block", 10**6),
    ("latent_channels", True),
    ("in_channels", 1.0),
    ("out_channels", -3),
    ("norm_num_groups", None),
    ("sample_size", [8, 8]),
    ("scaling_factor", 0),
    ("scaling_factor", float("nan")),
    ("scaling_factor", "0.18"),
    ("shift_factor", float("inf")),
    ("latents_mean", [0.0, 0.0]),
    ("latents_mean", [0.0, 0.0, 0.0, 0.0]),
    ("latents_std", [1.0, 1.0, 0.0, 1.0]),
    ("force_upcast", "no"),
    ("use_quant_conv", None),
    ("use_post_quant_conv", 1),
    ("mid_block_add_attention", 0),
]


@pytest.mark.parametrize(("key", "value"), KL_REFUSED, ids=str)
def test_a_config_we_cannot_honour_is_refused_by_name(key, value):
    with pytest.raises(ArtifactError, match=key) as caught:
        AutoencoderKLConfig.from_dict({**SD, key: value})
    assert "\n" not in str(caught.value)


def test_two_ways_to_shift_are_refused_together():
    both = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}
    with pytest.raises(ArtifactError, match="shift_factor"):
        AutoencoderKLConfig.from_dict({**SD, **both})


def test_shapes_that_do_not_fit_are_refused():
    network = make_kl()
    for shape in [(1, 3, 16, 12), (1, 3, 0, 8), (1, 4, 16, 16), (3, 16, 16)]:
        for encode in (network.encode, network.encode_tiled, network.to_latents):
            with pytest.raises(ShapeError, match="multiples of 8"):
                encode(torch.zeros(shape))
    for shape in [(1, 3, 2, 2), (4, 2, 2), (1, 4, 0, 2)]:
        for decode in (network.decode, network.decode_tiled, network.to_images):
            with pytest.raises(ShapeError, match="latents"):
                decode(torch.zeros(shape))
    for tile, overlap in [(0, 0), (4, 4), (4, -1)]:
        with pytest.raises(ShapeError, match="overlap"):
            network.decode_tiled(torch.zeros(1, 4, 8, 8), tile, overlap)
    with pytest.raises(ShapeError, match="noise"):
        Moments(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).sample(torch.zeros(4, 2, 2))


# Tiles


@given(size=st.integers(1, 200), tile=st.integers(1, 64), share=st.floats(0, 0.999), scale=st.integers(1, 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_tiles_cover_an_axis_and_their_weights_add_up_to_one(size, tile, share, scale):
    overlap = int(tile * share)
    starts, tile = tile_starts(size, tile, overlap), min(size, tile)
    assert starts[0] == 0 and starts[-1] + tile == size
    assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
    for margin in {0, overlap // 4, overlap // 2}:
        weights = tile_weights(starts, size, tile, margin, scale)
        total = torch.zeros(size * scale, dtype=torch.float64)
        for start, row in zip(starts, weights, strict=True):
            total[start * scale : (start + tile) * scale] += row
        assert weights.min() >= 0 and (total - 1).abs().max() < 1e-12
        inner = weights[1:, : margin * scale], weights[:-1, (tile - margin) * scale :]
        assert all(part.abs().sum() == 0 for part in inner)  # what lacks its surrounding counts nothing


def test_a_network_that_looks_nowhere_is_tiled_exactly():
    x = torch.randn(2, 3, 21, 10)
    doubled = run_tiled(lambda part: F.interpolate(part, scale_factor=2), x, tile=8, overlap=3, radius=0, grow=2)
    assert torch.allclose(doubled, F.interpolate(x, scale_factor=2), atol=1e-6)
    halved = run_tiled(lambda part: F.avg_pool2d(part, 2), x[:, :, :20], tile=4, overlap=1, radius=0, shrink=2)
    assert torch.allclose(halved, F.avg_pool2d(x[:, :, :20], 2), atol=1e-6)


def smooth_latents(size: int, channels: int = 4) -> Tensor:
    """Something like a picture: most of it large, a little of it fine."""
    large = F.interpolate(torch.randn(1, channels, 8, 8), size=(size, size), mode="bicubic")
    return large + 0.3 * torch.randn(1, channels, size, size)


@torch.no_grad()
def test_tiles_of_autoencoder_kl_are_no_worse_than_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason=NEEDS_DIFFUSERS)
    errors: dict[str, list[float]] = {"our decode": [], "their decode": [], "our encode": [], "their encode": []}
    tile, overlap = 16, 4
    for seed in range(4):
        torch.manual_seed(seed)
        theirs = diffusers.AutoencoderKL(**SD).eval()
        scramble(theirs, seed)
        theirs.tile_latent_min_size, theirs.tile_sample_min_size = tile, 8 * tile
        theirs.tile_overlap_factor = overlap / tile
        ours = AutoencoderKL(AutoencoderKLConfig.from_dict(theirs.config))
        load_strictly(ours, theirs.state_dict(), "random")
        latents = smooth_latents(28)
        whole = ours.decode(latents)
        errors["our decode"].append(rms_error(ours.decode_tiled(latents, tile, overlap), whole))
        errors["their decode"].append(rms_error(theirs.tiled_decode(latents).sample, whole))
        images = smooth_latents(8 * 28, 3)
        mean = ours.encode(images).mean
        errors["our encode"].append(rms_error(ours.encode_tiled(images, tile, overlap).mean, mean))
        errors["their encode"].append(rms_error(theirs._tiled_encode(images)[:, :4], mean))
    mean_errors = {name: sum(values) / len(values) for name, values in errors.items()}
    assert 0 < mean_errors["our decode"] <= mean_errors["their decode"], mean_errors
    assert 0 < mean_errors["our encode"] <= mean_errors["their encode"], mean_errors


@torch.no_grad()
def test_what_fits_into_one_tile_is_not_cut():
    network = make_kl()
    latents, images = torch.randn(1, 4, 5, 3), torch.rand(1, 3, 24, 40)
    assert relative_error(network.decode_tiled(latents), network.decode(latents)) <= RELATIVE
    assert relative_error(network.encode_tiled(images).mean, network.encode(images).mean) <= RELATIVE
