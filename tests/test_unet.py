"""The UNet is diffusers' UNet2DModel: same names, same config, same numbers; and a flow map extends it exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import SIZES, make_model

from fastdiff.backends.eager import UNetNetwork
from fastdiff.benchmarks.unet_parity import RELATIVE, relative_error, scramble
from fastdiff.errors import ArtifactError
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet
from fastdiff.models.weights import load_model, load_strictly
from fastdiff.pipeline import BUNDLED
from fastdiff.sampling import Cond

pytestmark = pytest.mark.fast
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"resnet_time_scale_shift": "default", "attn_norm_num_groups": None},
    "scale_shift": {"attn_norm_num_groups": None},  # drops the norm of the middle attention
    "middle_norm": {"attn_norm_num_groups": 8, "resnet_time_scale_shift": "default"},
    "attention_everywhere": {
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "attention_head_dim": None,
    },
    "no_attention": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
    "two_layers": {"layers_per_block": 2, "in_channels": 3, "out_channels": 6, "norm_eps": 1e-3},
    "padding_0": {"downsample_padding": 0},
    "classes": {"num_class_embeds": 5},
    "sin_first": {"flip_sin_to_cos": False, "freq_shift": 1},
    "wide_time": {"time_embedding_dim": 24, "num_class_embeds": 3},
    "one_level": {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 4,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diffusers_unet_loads_strictly_and_gives_the_same_output(variant):
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
    theirs = diffusers.UNet2DModel(**{**SIZES, **VARIANTS[variant]}).eval()
    scramble(theirs)
    config = UNetConfig.from_dict(theirs.config)
    with torch.device("meta"):
        ours = UNet(config)
    load_strictly(ours, theirs.state_dict(), variant)
    x, times = torch.randn(3, config.in_channels, 8, 8), torch.tensor([999.0, 17.25, 0.0])
    labels = torch.tensor([0, 2, 1]) if config.num_class_embeds else None
    wanted = theirs(x, times, labels).sample
    assert wanted.shape[1] == config.out_channels and wanted.std() > 0.05
    assert relative_error(ours(x, times, labels), wanted) <= RELATIVE


@torch.no_grad()
def test_diffusers_loads_the_bundled_folder_as_it_is():
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
    folder = BUNDLED / "digits"
    theirs = diffusers.UNet2DModel.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
    ).eval()
    ours = load_model(folder).network
    x, times, labels = torch.randn(2, 1, 32, 32), torch.tensor([1000.0, 250.0]), torch.tensor([7, 10])
    assert relative_error(ours(x, times, labels), theirs(x, times, labels).sample) <= RELATIVE


@torch.no_grad()
def test_the_diagonal_of_a_flow_map_is_the_one_time_network_bit_for_bit():
    unet = make_model(two_time=True).network
    x, times, labels = torch.randn(5, 1, 8, 8), torch.rand(5) * 1000, torch.arange(5) % 4
    one_time = unet(x, times, labels)
    assert torch.equal(unet(x, times, labels, times), one_time)
    mixed = unet(x, times, labels, torch.where(torch.arange(5) < 3, times, times / 2))
    assert torch.equal(mixed[:3], one_time[:3])  # exact whatever the other rows of the batch do
    assert not torch.allclose(mixed[3:], one_time[3:], rtol=1e-3)  # and the second time is not ignored


@torch.no_grad()
@pytest.mark.parametrize("two_time", [False, True])
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("own_times", [False, True])
def test_prepare_and_trunk_equal_forward(two_time, classes, own_times):
    unet = make_model(two_time=two_time, classes=classes).network
    batch, rows = 4, 3
    times = torch.rand(batch if own_times else 1, rows, 2) * 1000
    labels = torch.tensor([3, 0, 3, 1]) if classes else None
    row_index = torch.tensor([2, 0, 1, 2])
    x = torch.randn(batch, 1, 8, 8)
    network = UNetNetwork(unet)
    prepared = network.prepare(Cond(labels), times)
    told = times.expand(batch, -1, -1)[torch.arange(batch), row_index]
    wanted = unet(x, told[:, 0], labels, told[:, 1] if two_time else None)
    assert relative_error(network(x, row_index, prepared), wanted) <= RELATIVE
    if classes and not own_times:
        assert prepared.rows.shape[0] == 3  # each different label is embedded once


REFUSED = [
    ("_class_name", "UNet3DConditionModel"),
    ("_class_name", ["a"]),
    ("_class_name", {}),
    ("center_input_sample", True),
    ("time_embedding_type", "fourier"),
    ("mid_block_type", None),
    ("mid_block_scale_factor", 2),
    ("act_fn", "gelu"),
    ("class_embed_type", "timestep"),
    ("downsample_type", "fir"),
    ("upsample_type", "fir"),
    ("num_train_timesteps", 4000),
    ("frobnicate", 1),
    ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
    ("down_block_types", ["DownBlock2D"]),
    ("down_block_types", [["DownBlock2D"], "DownBlock2D"]),
    ("up_block_types", "UpBlock2D"),
    ("resnet_time_scale_shift", "ada_group"),
    ("norm_eps", 0.0),
    ("norm_eps", float("nan")),
    ("norm_eps", "1e-5"),
    ("block_out_channels", []),
    ("block_out_channels", [8, 18]),
    ("block_out_channels", [8, True]),
    ("block_out_channels", [8, 10**12]),
    ("block_out_channels", 8),
    ("sample_size", [8, 8]),
    ("sample_size", 0),
    ("sample_size", 10**9),
    ("in_channels", 1.0),
    ("out_channels", -1),
    ("layers_per_block", 10**6),
    ("norm_num_groups", None),
    ("attention_head_dim", 3),
    ("attn_norm_num_groups", 5),
    ("num_class_embeds", 0),
    ("num_class_embeds", 10**9),
    ("time_embedding_dim", -4),
    ("downsample_padding", 2),
    ("freq_shift", 2),
    ("flip_sin_to_cos", "no"),
    ("add_attention", None),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=str)
def test_a_config_we_cannot_honour_is_refused_by_name(key, value):
    with pytest.raises(ArtifactError, match=key) as caught:
        with torch.device("meta"):
            UNet(UNetConfig.from_dict({**SIZES, key: value}))
    assert "\n" not in str(caught.value)
