"""Single-file checkpoints: every name of the full-size models, once, with the shape and value diffusers gives it."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from torch import Tensor

from fastdiff.errors import ArtifactError
from fastdiff.models import single_file as sf
from fastdiff.models.single_file import UNET, VAE, Layout, convert, detect

pytestmark = pytest.mark.fast

FAMILIES = ["sd1", "sd2", "sdxl"]
ENCODERS = [("sd1", 0), ("sd2", 0), ("sdxl", 0), ("sdxl", 1)]
CLIP_AT = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP_AT = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}


# --- the published models, without memory ---


@cache
def published_unet(family: str, in_channels: int = 4) -> dict[str, Tensor]:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**constructor(sf.unet_config(Layout(family, in_channels))))
    return model.state_dict()


@cache
def published_vae() -> dict[str, Tensor]:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.AutoencoderKL(**constructor(sf.vae_config(Layout("sd1")))).state_dict()


@cache
def text_model(family: str, index: int):
    transformers = pytest.importorskip("transformers")
    config = sf.text_encoder_config(Layout(family), index)
    with torch.device("meta"):
        return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))


@cache
def published_text(family: str, index: int) -> dict[str, Tensor]:
    """As in published files: with ``text_model.``, whatever this version of transformers does in memory."""
    plain = text_model(family, index).state_dict()
    bare = re.compile(r"^(embeddings|encoder|final_layer_norm)\.")
    return {bare.sub(r"text_model.\1.", name): tensor for name, tensor in plain.items()}


def constructor(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


# --- the way back, written apart from the tables under test ---

BACK_RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
BACK_ENDS = [
    ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."), ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
]  # fmt: skip


def original_unet_name(name: str, names) -> str:
    for new, old in BACK_ENDS:
        if name.startswith(new):
            return name.replace(new, old, 1)
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name):
        way, level, kind, i, rest = found.groups()
        block = 3 * int(level) + int(i) + (way == "down")
        head = f"{'input' if way == 'down' else 'output'}_blocks.{block}.{0 if kind == 'resnets' else 1}."
    elif found := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op.{found[2]}"
    elif found := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.+)", name):
        attends = any(other.startswith(f"up_blocks.{found[1]}.attentions") for other in names)
        return f"output_blocks.{3 * int(found[1]) + 2}.{2 if attends else 1}.conv.{found[2]}"
    else:
        kind, i, rest = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name).groups()
        head = f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}."
    if kind == "resnets":
        for new, old in BACK_RESNET:
            rest = re.sub(rf"^{new}\.", f"{old}.", rest)
    return head + rest


def original_vae(tensors) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attentions" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        found[VAE + name] = tensor
    return found


def original_open_clip(tensors, prefix: str, extra_layer: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if re.search(r"self_attn\.[qkv]_proj", name):
            if "q_proj" not in name:
                continue
            parts = [tensors[f"text_model.{name}".replace("q_proj", f"{p}_proj")] for p in "qkv"]
            tensor = torch.cat(parts)
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        name = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
        name = name.replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2").replace("fc1", "c_fc")
        name = name.replace("fc2", "c_proj").replace("final_layer_norm", "ln_final")
        name = name.replace("embeddings.token_embedding", "token_embedding")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        found[prefix + name] = tensor
    if extra_layer:
        last = {n.replace("resblocks.22", "resblocks.23"): t for n, t in found.items() if "resblocks.22" in n}
        width = tensors["text_model.final_layer_norm.weight"].shape[0]
        found |= last | {prefix + "text_projection": tensor.new_zeros(width, width)}
    return found | {prefix + "logit_scale": next(iter(tensors.values())).new_zeros(())}


def original_text(family: str, index: int, tensors) -> dict[str, Tensor]:
    if family == "sd1" or (family, index) == ("sdxl", 0):
        ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        return {CLIP_AT[family] + name: tensor for name, tensor in (tensors | ids).items()}
    return original_open_clip(tensors, OPEN_CLIP_AT[family], extra_layer=family == "sd2")


def original_unet(tensors) -> dict[str, Tensor]:
    return {UNET + original_unet_name(name, tensors): tensor for name, tensor in tensors.items()}


SCHEDULE = [
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
]  # fmt: skip


@cache
def checkpoint(family: str, in_channels: int = 4) -> dict[str, Tensor]:
    """A full-size checkpoint of meta tensors, with what training leaves in such files."""
    found = original_unet(published_unet(family, in_channels)) | original_vae(published_vae())
    for index in range(Layout(family).text_encoders):
        found |= original_text(family, index, published_text(family, index))
    found |= {name: torch.empty(1000, device="meta") for name in SCHEDULE}
    found["model_ema.diffusion_modelinput_blocks00weight"] = torch.empty(1, device="meta")
    found["first_stage_model.loss.logvar"] = torch.empty((), device="meta")
    return found


def tiny(names) -> dict[str, Tensor]:
    """Small random tensors under given names: fast to compare, and as different as the names."""
    return {name: torch.rand(2) for name in names}


def same(got, wanted) -> None:
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())[:5]
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# --- whole models ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_channels", [4, 9])
def test_every_tensor_of_the_full_size_models_appears_once_with_its_shape(family, in_channels):
    file = checkpoint(family, in_channels)
    layout = detect(file)
    assert layout == Layout(family, in_channels) and layout.inpainting == (in_channels == 9)
    parts = convert(file, layout)
    wanted = {"unet": published_unet(family, in_channels), "vae": published_vae()}
    for index in range(layout.text_encoders):
        wanted["text_encoder_2" if index else "text_encoder"] = published_text(family, index)
    assert parts.keys() == wanted.keys()
    for part in wanted:
        assert parts[part].keys() == wanted[part].keys()
        for name, tensor in wanted[part].items():
            assert parts[part][name].shape == tensor.shape, name


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_values_are_those_of_diffusers_converter(family):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    file = original_unet(tiny(published_unet(family)))
    config = sf.unet_config(Layout(family))
    same(sf.unet_tensors(file, Layout(family)), utils.convert_ldm_unet_checkpoint(dict(file), config))


def test_vae_values_are_those_of_diffusers_converter():
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    new = tiny(published_vae())
    new |= {name: torch.rand(2, 2) for name in new if "attentions" in name and name.endswith("weight")}
    file = original_vae(new)
    converted = sf.vae_tensors(file)
    same(converted, new)
    same(converted, utils.convert_ldm_vae_checkpoint(dict(file), sf.vae_config(Layout("sd1"))))
    alone = {name.removeprefix(VAE): tensor for name, tensor in file.items()} | {"loss.logvar": torch.zeros(())}
    same(sf.vae_tensors(alone, prefix=""), new)


def test_a_vae_whose_attention_is_linear_already_is_taken_as_it_is():
    new = tiny(published_vae())
    new |= {name: torch.rand(2, 2) for name in new if "attentions" in name and name.endswith("weight")}
    same(sf.vae_tensors({n: t.flatten(1) if t.ndim > 2 else t for n, t in original_vae(new).items()}), new)


@pytest.mark.parametrize("family, index", ENCODERS)
def test_text_encoder_values_are_those_of_diffusers_converter(family, index):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    new = tiny(published_text(family, index))
    new |= {name: torch.rand(2, 2) for name in new if "proj.weight" in name or name == "text_projection.weight"}
    file = original_text(family, index, new)
    converted = sf.text_encoder_tensors(file, Layout(family), index)
    same(converted, new)
    if family in OPEN_CLIP_AT and (family, index) != ("sdxl", 0):
        prefix = OPEN_CLIP_AT[family]
        file.setdefault(prefix + "text_projection", torch.rand(2, 2))
        theirs = utils.convert_open_clip_checkpoint(text_model(family, index), dict(file), prefix=prefix)
        theirs = {name: tensor for name, tensor in theirs.items() if name in new}
    else:
        theirs = utils.convert_ldm_clip_checkpoint(file)
        theirs.pop("text_model.embeddings.position_ids")
    same(converted, theirs)


def test_split_projections_own_their_memory():
    new = {name: torch.rand(2, 2) for name in published_text("sdxl", 1)}
    converted = sf.text_encoder_tensors(original_text("sdxl", 1, new), Layout("sdxl"), 1)
    query = converted["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert query.untyped_storage().nbytes() == query.nbytes
    assert converted["text_projection.weight"].is_contiguous()


def test_a_clip_without_its_outer_name_is_read():
    new = tiny(published_text("sd1", 0))
    file = {CLIP_AT["sd1"] + name.removeprefix("text_model."): tensor for name, tensor in new.items()}
    same(sf.text_encoder_tensors(file, Layout("sd1")), new)


@pytest.mark.parametrize("family, index", ENCODERS)
def test_transformers_reads_a_folder_with_our_names(family, index, tmp_path):
    """A small encoder under published names, through ``from_pretrained``: nothing missing, nothing unexpected."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 99, "projection_dim": 8}
    config = sf.text_encoder_config(Layout(family), index) | small
    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        shapes = kind(transformers.CLIPTextConfig(**config)).state_dict()
    bare = re.compile(r"^(embeddings|encoder|final_layer_norm)\.")
    new = {bare.sub(r"text_model.\1.", name): torch.rand(tensor.shape) for name, tensor in shapes.items()}
    converted = sf.text_encoder_tensors(original_text(family, index, new), Layout(family), index)
    transformers.CLIPTextConfig(**config).save_pretrained(tmp_path)
    save_file(converted, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    loaded = {bare.sub(r"text_model.\1.", name): tensor for name, tensor in model.state_dict().items()}
    same(loaded, new)


# --- what a file is ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_comes_from_the_option_then_the_metadata_then_a_mark(family):
    file = checkpoint(family)
    marked = file | {"v_pred": torch.zeros(0)}
    says_v, says_eps = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
    assert detect(file).prediction == "epsilon"
    assert detect(file, says_v).prediction == "v_prediction"
    assert detect(file, {"modelspec.architecture": "stable-diffusion-v2-768-v"}).prediction == "v_prediction"
    assert detect(file, says_v, "epsilon").prediction == "epsilon"
    assert detect(file, None, "v_prediction").prediction == "v_prediction"
    assert detect(marked).prediction == "v_prediction"
    assert detect(marked, says_eps).prediction == "epsilon"
    assert not detect(marked).zero_terminal_snr
    zero = detect(marked | {"ztsnr": torch.zeros(0)})
    assert zero.zero_terminal_snr and sf.scheduler_config(zero)["rescale_betas_zero_snr"]
    with pytest.raises(ArtifactError, match="prediction is 'sample'; allowed"):
        detect(file, None, "sample")
    with pytest.raises(ArtifactError, match="prediction is 'x0'; allowed"):
        detect(file, {"modelspec.prediction_type": "x0"})


def shaped(file, **shapes):
    return file | {
        {"first": UNET + "input_blocks.0.0.weight", "context": sf._CONTEXT}[key]: torch.empty(shape, device="meta")
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: shaped(f, first=(384, 4, 3, 3), context=(768, 1280)), "SDXL refiner"),
        (lambda f: shaped(f, first=(320, 8, 3, 3)), "reads 8 channels; allowed: 4, or 9"),
        (lambda f: shaped(f, context=(320, 999)), "context of 999; allowed"),
        (lambda f: shaped(f, first=(256, 4, 3, 3)), "256 channels"),
        (lambda f: shaped(f, first=(320,)), "not SD 1.x"),
        (lambda f: {}, "not SD 1.x"),
        (lambda f: {"lora_unet_mid_block.alpha": torch.zeros(())}, "not SD 1.x"),
        (lambda f: f | {"edm_mean": torch.zeros(4)}, "Playground"),
        (lambda f: {UNET + "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, "FLUX"),
        (lambda f: {"control_model.time_embed.0.weight": torch.zeros(1)}, "ControlNet"),
    ],
)
def test_what_is_not_such_a_checkpoint_is_refused_by_name(change, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        detect(change(checkpoint("sd1")))
    assert "\n" not in str(caught.value)


STRANGERS = [
    UNET + "input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight",  # one transformer block too many for SD 1.x
    UNET + "label_emb.0.0.weight",
    UNET + "input_blocks.1.0.in_layers.0.scale",
    UNET + "stranger",
    VAE + "encoder.down.4.block.0.conv1.weight",
    CLIP_AT["sd1"] + "text_model.encoder.layers.12.mlp.fc1.weight",
    "stranger.weight",
    "conditioner.embedders.1.model.ln_final.weight",
]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_tensor_left_over_is_named(name):
    file = checkpoint("sd1") | {name: torch.empty(1, device="meta")}
    with pytest.raises(ArtifactError, match=re.escape(repr(name))):
        convert(file, Layout("sd1"))


@pytest.mark.parametrize(
    "family, name",
    [
        ("sd1", UNET + "middle_block.1.proj_in.weight"),
        ("sdxl", UNET + "label_emb.0.2.weight"),
        ("sdxl", UNET + "input_blocks.7.1.transformer_blocks.9.norm1.weight"),  # as in smaller versions of SDXL
        ("sd2", VAE + "decoder.up.3.upsample.conv.weight"),
        ("sd1", CLIP_AT["sd1"] + "text_model.final_layer_norm.weight"),
        ("sdxl", OPEN_CLIP_AT["sdxl"] + "text_projection"),
    ],
)
def test_a_tensor_that_is_missing_is_named(family, name):
    file = {key: tensor for key, tensor in checkpoint(family).items() if key != name}
    with pytest.raises(ArtifactError, match=f"holds no '{re.escape(name)}"):
        convert(file, Layout(family))


@pytest.mark.parametrize("prefix", [UNET, VAE, CLIP_AT["sd1"]])
def test_a_part_that_is_missing_is_named(prefix):
    file = {name: tensor for name, tensor in checkpoint("sd1").items() if not name.startswith(prefix)}
    with pytest.raises(ArtifactError, match=f"no tensor under '{re.escape(prefix)}'"):
        convert(file, Layout("sd1"))


def test_odd_packed_projections_and_encoder_numbers_are_refused():
    name = OPEN_CLIP_AT["sdxl"] + "transformer.resblocks.0.attn.in_proj_weight"
    with pytest.raises(ArtifactError, match=re.escape(name)):
        sf.text_encoder_tensors(checkpoint("sdxl") | {name: torch.empty(4, 2)}, Layout("sdxl"), 1)
    with pytest.raises(ArtifactError, match="text encoder 1 of sd1; allowed: 0 to 0"):
        sf.text_encoder_tensors(checkpoint("sd1"), Layout("sd1"), 1)


def test_dropped_names_never_hide_a_tensor_that_is_used():
    for family in FAMILIES:
        used = convert(checkpoint(family), Layout(family))
        assert sum(map(len, used.values())) == sum(len(p) for p in (published_unet(family), published_vae())) + sum(
            len(published_text(family, i)) for i in range(Layout(family).text_encoders)
        )
    assert all(reason for reason in sf.DROPPED.values())


def test_configs_are_the_callers_to_change():
    first = sf.unet_config(Layout("sdxl"))
    first["block_out_channels"].append(1)
    assert sf.unet_config(Layout("sdxl"))["block_out_channels"] == [320, 640, 1280]
    assert sf.unet_config(Layout("sd2", prediction="v_prediction"))["sample_size"] == 96
    assert sf.unet_config(Layout("sd2"))["sample_size"] == 64


def test_the_names_of_all_families_agree_where_they_overlap():
    apart = [sf.family_modules([family]) for family in FAMILIES]
    together = sf.family_modules()
    assert all(together[old] == new for names in apart for old, new in names.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_takes_the_scheduler_config(family):
    diffusers = pytest.importorskip("diffusers")
    config = sf.scheduler_config(Layout(family, prediction="v_prediction"))
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.steps_offset == 1
