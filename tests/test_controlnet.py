"""The ControlNet is diffusers': same names, same config, same residuals, and together with the UNet the same output."""

from __future__ import annotations

import pytest
import torch

from fastdiff.benchmarks.layouts import SD15, SDXL, scaled
from fastdiff.benchmarks.unet_parity import RELATIVE, asked, inputs, pair, relative_error, scramble
from fastdiff.errors import ArtifactError
from fastdiff.models.controlnet import ControlNet, ControlNetConfig
from fastdiff.models.weights import load_strictly


@torch.no_grad()
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("layout", [SD15, SDXL], ids=["SD 1.5", "SDXL"])
def test_residuals_and_their_effect_are_diffusers_own(layout, order):
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
    theirs, ours = pair(scaled(layout, 8))
    their_net = diffusers.ControlNetModel.from_unet(
        theirs, conditioning_embedding_out_channels=(4, 8, 8), controlnet_conditioning_channel_order=order
    ).eval()
    scramble(their_net, seed=3)
    with torch.device("meta"):
        our_net = ControlNet(ControlNetConfig.from_dict(their_net.config))
    load_strictly(our_net, their_net.state_dict(), "controlnet")
    given, picture = inputs(ours.config), torch.rand(2, 3, 64, 64)
    added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    down, middle = their_net(
        given["sample"], given["timestep"], given["encoder_hidden_states"], picture, 0.7,
        added_cond_kwargs=added or None, return_dict=False,
    )  # fmt: skip
    residuals = our_net.trunk(
        given["sample"], our_net.time_rows(our_net.embed(given["timestep"], **added)),
        our_net.contexts(given["encoder_hidden_states"]), our_net.hint(picture),
    )  # fmt: skip
    for one, other in zip(residuals, [*down, middle], strict=True):
        assert relative_error(0.7 * one, other) <= RELATIVE
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    wanted = asked(theirs, given, **more)
    assert relative_error(ours(**given, control=[0.7 * one for one in residuals]), wanted) <= RELATIVE


def test_the_full_size_network_has_the_published_size():
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig.from_dict({k: v for k, v in SD15.items() if k not in (
            "_class_name", "up_block_types", "out_channels", "sample_size", "center_input_sample")}))  # fmt: skip
    assert sum(parameter.numel() for parameter in net.parameters()) == 361_279_120


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet2DConditionModel"),
        ("global_pool_conditions", True),
        ("conditioning_embedding_out_channels", []),
        ("conditioning_embedding_out_channels", [0]),
        ("conditioning_channels", 0),
        ("controlnet_conditioning_channel_order", "grb"),
        ("down_block_types", "DownBlock2D"),
        ("cross_attention_dim", -1),
        ("frobnicate", 1),
    ],
    ids=str,
)
def test_a_config_we_cannot_honour_is_refused_by_name(key, value):
    with pytest.raises(ArtifactError, match=key):
        ControlNetConfig.from_dict({key: value})
