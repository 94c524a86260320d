"""The published layouts, scaled down, and drawn ones, against diffusers' networks with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastdiff.benchmarks.layouts import LAYOUTS, PARAMETERS, SD15, SDXL, scaled  # noqa: E402
from fastdiff.benchmarks.unet_parity import RELATIVE, asked, error, inputs, pair, relative_error  # noqa: E402
from fastdiff.errors import ArtifactError, ShapeError  # noqa: E402
from fastdiff.models.config import UNetConfig  # noqa: E402
from fastdiff.models.unet import UNet  # noqa: E402

SMALL = {name: scaled(config, 8) for name, config in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_are_diffusers_own(name):
    size = (32, 32) if name == "DDPM CelebA" else (16, 16)
    assert error(SMALL[name], size=size) <= RELATIVE


@pytest.mark.parametrize("size", [(10, 14), (9, 13), (24, 8)], ids=str)
@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_sizes_that_do_not_halve_evenly(name, size):
    assert error(SMALL[name], size=size, batch=1) <= RELATIVE


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_networks_have_the_published_names_and_sizes(name):
    import diffusers

    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(LAYOUTS[name]))
        theirs = getattr(diffusers, LAYOUTS[name]["_class_name"]).from_config(LAYOUTS[name])
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == PARAMETERS.get(name, count)


def lists(count: int, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(values, st.lists(values, min_size=count, max_size=count))


@st.composite
def conditional(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 3))
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "norm_num_groups": 4,
        "block_out_channels": draw(st.lists(st.sampled_from([8, 16, 24]), min_size=count, max_size=count)),
        "attention_head_dim": draw(lists(count, st.sampled_from([1, 2, 4]))),
        "cross_attention_dim": draw(st.sampled_from([8, 20])),
        "layers_per_block": draw(lists(count, st.integers(1, 2))),
        "transformer_layers_per_block": draw(lists(count, st.integers(1, 2))),
        "only_cross_attention": draw(lists(count, st.booleans())),
        "use_linear_projection": draw(st.booleans()),
        "upcast_attention": draw(st.booleans()),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "in_channels": draw(st.sampled_from([4, 9])),
        "out_channels": draw(st.sampled_from([4, 8])),
        "flip_sin_to_cos": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 5])),
        "time_cond_proj_dim": draw(st.sampled_from([None, 6])),
        "downsample_padding": 1,
    }
    down = draw(st.lists(st.sampled_from(["DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"]),
                         min_size=count, max_size=count))  # fmt: skip
    config["down_block_types"] = down
    config["up_block_types"] = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in down[::-1]]
    if draw(st.booleans()):
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                   "projection_class_embeddings_input_dim": 30}  # fmt: skip
    return config


@st.composite
def plain(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 3))
    types = st.lists(st.sampled_from(["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]), min_size=count,
                     max_size=count)  # fmt: skip
    down, up = draw(types), draw(types)
    return {
        "_class_name": "UNet2DModel",
        "norm_num_groups": 4,
        "block_out_channels": draw(st.lists(st.sampled_from([8, 16, 24]), min_size=count, max_size=count)),
        "attention_head_dim": draw(st.sampled_from([None, 4, 8])),
        "layers_per_block": draw(st.integers(1, 2)),
        "down_block_types": down,
        "up_block_types": [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in up],
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "attn_norm_num_groups": draw(st.sampled_from([None, 2])),
        "add_attention": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 5])),
        "time_embedding_dim": draw(st.sampled_from([None, 20])),
        "freq_shift": draw(st.integers(0, 1)),
    }


@settings(derandomize=True, max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(conditional(), plain()))
def test_drawn_configs_are_diffusers_own(config):
    assert error(config, size=(8, 8)) <= RELATIVE


@torch.no_grad()
def test_controlnet_residuals_are_added_where_diffusers_adds_them():
    theirs, ours = pair(SMALL["SD 1.5"])
    given = inputs(ours.config)
    shapes = []
    hook = [block.register_forward_hook(lambda m, a, out: shapes.extend(part.shape for part in out[1]))
            for block in theirs.down_blocks]  # fmt: skip
    first = theirs.conv_in.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    middle: list[torch.Size] = []
    last = theirs.mid_block.register_forward_hook(lambda m, a, out: middle.append(out.shape))
    asked(theirs, given)
    for one in (*hook, first, last):
        one.remove()
    down, mid = [3 * torch.randn(shape) for shape in shapes], 3 * torch.randn(middle[0])
    wanted = asked(theirs, given, down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid)
    assert relative_error(ours(**given, control=[*down, mid]), wanted) <= RELATIVE
    assert relative_error(ours(**given), wanted) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD 2.1", "SDXL", "SD x4 upscaler"])
def test_what_is_prepared_once_equals_the_whole(name):
    """The parts that do not depend on the image, computed apart."""
    _, ours = pair(SMALL[name])
    given = inputs(ours.config)
    whole = ours(**given)
    tokens = given.pop("encoder_hidden_states")
    x, timestep = given.pop("sample"), given.pop("timestep")
    rows, contexts = ours.time_rows(ours.embed(timestep, **given)), ours.contexts(tokens)
    assert torch.equal(ours.trunk(x, rows, contexts), whole)


REFUSED = [
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("down_block_types", ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"]),
    ("dual_cross_attention", True),
    ("attention_type", "gated"),
    ("encoder_hid_dim_type", "text_proj"),
    ("class_embed_type", "projection"),
    ("addition_embed_type", "image"),
    ("conv_in_kernel", 1),
    ("resnet_skip_time_act", True),
    ("attention_head_dim", [5, 10, 20]),
    ("attention_head_dim", 7),
    ("attention_head_dim", None),
    ("cross_attention_dim", None),
    ("cross_attention_dim", [768, 768]),
    ("transformer_layers_per_block", [[1, 1], [2, 2], 1, 1]),
    ("transformer_layers_per_block", 10**6),
    ("only_cross_attention", [True]),
    ("reverse_transformer_layers_per_block", [1, 1, 1, 1]),
    ("use_linear_projection", 1),
    ("num_attention_heads", 8),
    ("attn_norm_num_groups", 4),
]


def test_a_config_of_too_many_layers_is_refused_before_anything_is_built():
    with pytest.raises(ArtifactError, match="layers in all; allowed: at most 768"):
        UNetConfig.from_dict({**SD15, "layers_per_block": 3, "transformer_layers_per_block": 64})


def test_what_a_message_shows_is_short():
    with pytest.raises(ArtifactError) as caught:
        UNetConfig.from_dict({**SD15, "act_fn": "x" * 10_000})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=str)
def test_a_conditional_config_we_cannot_honour_is_refused_by_name(key, value):
    with pytest.raises(ArtifactError, match=key) as caught:
        UNetConfig.from_dict({**SD15, key: value})
    assert "\n" not in str(caught.value)


def test_a_config_written_is_the_config_read():
    for config in LAYOUTS.values():
        sizes = UNetConfig.from_dict(config)
        assert UNetConfig.from_dict(sizes.to_dict()) == sizes


def test_conditioning_that_is_missing_is_named():
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(SDXL))
        with pytest.raises(ShapeError, match="text_embeds and time_ids"):
            unet.embed(torch.zeros(1))
        with pytest.raises(ShapeError, match="encoder_hidden_states is None"):
            unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), text_embeds=torch.zeros(1, 1280), time_ids=torch.zeros(1, 6))
