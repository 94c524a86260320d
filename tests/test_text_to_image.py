"""Whole pipelines: the picture is diffusers' for the same prompt, generator and scheduler."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="text encoders need transformers (pip install 'fastdiff[text]')")
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
import tiny_pipelines as tiny  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.errors import ArtifactError, FastdiffError, PlanError, ShapeError  # noqa: E402
from fastdiff.text_to_image import TextToImage, load_folder  # noqa: E402

CLOSE = 1e-4  # of pictures in [0, 1]; 2/255 is asked for
PROMPTS = ["a cat", "two dogs, red"]
SIZE = {"height": 24, "width": 16}


def saved(pipe: Any, folder: Any, **how: Any) -> TextToImage:
    pipe.save_pretrained(folder)
    return load_folder(folder, **how)


def difference(ours: Any, theirs: Any) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01
    return float(np.abs(ours - theirs).max())


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (16, 24)) -> Image.Image:
    """A smooth random picture, width times height."""
    draw = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize(size, Image.Resampling.BICUBIC).convert(mode)


def hole(size: tuple[int, int] = (16, 24)) -> Image.Image:
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[4:16, 2:10] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    pipe = tiny.stable_diffusion(folder)
    return pipe, saved(pipe, folder / "model"), folder / "model"


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    pipe = tiny.stable_diffusion_xl(folder)
    return pipe, saved(pipe, folder / "model"), folder / "model"


SCHEDULERS = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("LCMScheduler", {}),
    ("DDPMScheduler", {"clip_sample": False}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULERS, ids=[name for name, _ in SCHEDULERS])
def test_text_to_image_is_diffusers_own(sd, tmp_path, name, options):
    pipe, _, _ = sd
    pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**pipe.components | {
        "scheduler": tiny.scheduler(name, **options)}, requires_safety_checker=False))  # fmt: skip
    ours = saved(pipe, tmp_path)
    call = {
        "prompt": PROMPTS,
        "negative_prompt": ["fog", "rain"],
        "num_inference_steps": 5,
        "output_type": "np",
        **SIZE,
    }
    theirs = pipe(**call, generator=tiny.generator()).images
    assert difference(ours(**call, generator=tiny.generator()).images, theirs) <= CLOSE


CALLS: list[dict[str, Any]] = [
    {"num_images_per_prompt": 2},
    {"guidance_scale": 1.0},
    {"guidance_rescale": 0.6},
    {"eta": 0.8},
    {"timesteps": None, "prompt": "one text"},
    {"generator": [3, 4]},
]


@pytest.mark.parametrize("change", CALLS, ids=str)
def test_options_of_the_call_are_diffusers_own(sd, change):
    pipe, ours, _ = sd
    seeds = change.get("generator", 0)

    def call(run: Any) -> Any:
        fresh = [tiny.generator(s) for s in seeds] if isinstance(seeds, list) else tiny.generator(seeds)
        options = {"prompt": PROMPTS, "num_inference_steps": 4, "output_type": "np", **SIZE, **change}
        return run(**{k: v for k, v in (options | {"generator": fresh}).items() if v is not None}).images

    assert difference(call(ours), call(pipe)) <= CLOSE


@pytest.mark.parametrize("change", [
    {}, {"negative_prompt": "fog"}, {"prompt_2": "b"}, {"clip_skip": 1}, {"num_images_per_prompt": 2},
    {"original_size": (64, 32), "crops_coords_top_left": (3, 5), "target_size": (48, 40)},
    {"negative_original_size": (16, 16), "negative_target_size": (32, 32)},
    {"guidance_scale": 1.0},
], ids=str)  # fmt: skip
def test_sdxl_is_diffusers_own(xl, change):
    pipe, ours, _ = xl
    call = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np", **SIZE, **change}
    theirs = pipe(**call, generator=tiny.generator()).images
    assert difference(ours(**call, generator=tiny.generator()).images, theirs) <= CLOSE


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("change", [{}, {"strength": 0.5}, {"num_images_per_prompt": 2}], ids=str)
def test_image_to_image_is_diffusers_own(request, kind, change):
    pipe, ours, _ = request.getfixturevalue(kind)
    name = "StableDiffusionImg2ImgPipeline" if kind == "sd" else "StableDiffusionXLImg2ImgPipeline"
    parts = dict(pipe.components)
    extra = {"requires_safety_checker": False} if kind == "sd" else {}
    theirs = tiny.quiet(getattr(diffusers, name)(**parts, **extra))
    call = {"prompt": "a cat", "image": picture(1), "num_inference_steps": 6, "output_type": "np", **change}
    wanted = theirs(**call, generator=tiny.generator()).images
    assert difference(ours(**call, generator=tiny.generator()).images, wanted) <= CLOSE


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("change", [{}, {"strength": 0.6}, {"num_images_per_prompt": 2}], ids=str)
def test_inpainting_is_diffusers_own(sd, tmp_path, channels, change):
    pipe = sd[0]
    parts = dict(pipe.components)
    if channels == 9:
        parts["unet"] = tiny.unet(in_channels=9)
    theirs = tiny.quiet(diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))
    ours = saved(theirs, tmp_path)
    call = {"prompt": "a cat", "image": picture(1), "mask_image": hole(), "num_inference_steps": 5,
            "output_type": "np", **SIZE, **change}  # fmt: skip
    wanted = theirs(**call, generator=tiny.generator()).images
    assert difference(ours(**call, generator=tiny.generator()).images, wanted) <= CLOSE


@pytest.mark.parametrize("change", [
    {}, {"controlnet_conditioning_scale": 0.4, "control_guidance_end": 0.5}, {"guidance_scale": 1.0},
], ids=str)  # fmt: skip
def test_controlnet_is_diffusers_own(sd, tmp_path, change):
    pipe, _, folder = sd
    net = tiny.controlnet(pipe.unet)
    net.save_pretrained(tmp_path)
    ours = load_folder(folder, controlnet=tmp_path)
    theirs = tiny.quiet(
        diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    )
    call = {"prompt": PROMPTS, "num_inference_steps": 4, "output_type": "np", **change}
    shown = picture(2)
    wanted = theirs(**call, image=shown, generator=tiny.generator()).images
    got = ours(**call, control_image=shown, height=24, width=16, generator=tiny.generator()).images
    assert difference(got, wanted) <= CLOSE
    assert (
        difference(
            ours(**call, control_image=picture(3), height=24, width=16, generator=tiny.generator()).images, wanted
        )
        > CLOSE
    )


def test_lora_is_diffusers_own_and_goes_without_a_trace(sd, tmp_path):
    pytest.importorskip("peft", reason="parity needs peft")
    from peft import LoraConfig

    pipe, _, folder = sd
    ours = load_folder(folder)
    theirs = tiny.quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None))
    theirs.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "to_out.0", "proj_in"]))
    tiny.scramble(theirs.unet, 11)
    from peft.utils import get_peft_model_state_dict

    theirs.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(theirs.unet))
    theirs = tiny.quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None))
    before = {name: value.clone() for name, value in ours.parts.unet.state_dict().items()}
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "output_type": "np", **SIZE}
    plain = theirs(**call, generator=tiny.generator()).images
    theirs.load_lora_weights(tmp_path)
    ours.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors")
    wanted = theirs(**call, generator=tiny.generator()).images
    assert difference(wanted, plain) > 0.01
    assert difference(ours(**call, generator=tiny.generator()).images, wanted) <= CLOSE
    ours.unload_lora_weights()
    assert all(torch.equal(value, before[name]) for name, value in ours.parts.unet.state_dict().items())


def test_a_latent_consistency_model_takes_its_strength_as_an_input(sd, tmp_path):
    pipe, _, _ = sd
    parts = dict(pipe.components) | {
        "unet": tiny.unet(time_cond_proj_dim=6), "scheduler": tiny.scheduler("LCMScheduler"),
    }  # fmt: skip
    theirs = tiny.quiet(diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))
    ours = saved(theirs, tmp_path)
    call = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 8.5, "output_type": "np", **SIZE}
    wanted = theirs(**call, generator=tiny.generator()).images
    assert difference(ours(**call, generator=tiny.generator()).images, wanted) <= CLOSE


def test_the_same_seed_gives_the_same_picture_in_any_batch(sd):
    _, ours, _ = sd
    call = {"num_inference_steps": 3, "output_type": "pt", "image": picture(1), "strength": 0.7}
    both = ours(PROMPTS, seed=[5, 6], **call).images
    alone = ours(PROMPTS[1], seed=6, **call).images
    assert torch.allclose(both[1:], alone, atol=1e-5)
    assert not torch.allclose(both[:1], alone, atol=1e-2)


def test_embeddings_take_the_place_of_prompts(xl):
    _, ours, _ = xl
    call = {"num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    words, no = ours.encode_prompt("a cat"), ours.encode_prompt("fog")
    got = ours(
        prompt_embeds=words.tokens, pooled_prompt_embeds=words.pooled, negative_prompt_embeds=no.tokens,
        negative_pooled_prompt_embeds=no.pooled, **call,
    ).images  # fmt: skip
    assert torch.equal(got, ours("a cat", negative_prompt="fog", **call).images)


def test_callbacks_see_every_step(sd):
    _, ours, _ = sd
    seen: list[tuple[int, float, tuple[int, ...]]] = []
    ours("a cat", num_inference_steps=3, seed=1, **SIZE,
         callback_on_step_end=lambda p, i, t, given: seen.append((i, t, tuple(given["latents"].shape))))  # fmt: skip
    assert [entry[0] for entry in seen] == [0, 1, 2] and {entry[2] for entry in seen} == {(1, 4, 12, 8)}


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "give prompt or prompt_embeds"),
    ({"prompt": []}, "prompt is"),
    ({"prompt": 3}, "prompt is 3"),
    ({"prompt": "a", "height": 25}, "height is 25"),
    ({"prompt": "a", "height": 2**20, "width": 2**20}, "at most"),
    ({"prompt": "a", "mask_image": hole()}, "give image"),
    ({"prompt": "a", "control_image": picture(1)}, "loaded with controlnet"),
    ({"prompt": "a", "clip_skip": 9}, "clip_skip is 9"),
    ({"prompt": "a", "output_type": "jpg"}, "output_type is 'jpg'"),
    ({"prompt": "a", "seed": 1, "generator": tiny.generator()}, "not both"),
    ({"prompt": "a", "prompt_embeds": torch.zeros(1, 16, 16)}, "not both"),
    ({"prompt": "a", "image": "cat.png"}, "image is a str"),
    ({"prompt": "a", "negative_prompt": ["b", "c", "d"]}, "negative prompts are"),
    ({"prompt": ["a"] * 3, "image": [picture(1)] * 2}, "2 pictures for 3 images"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_calls_are_named(sd, options, message):
    with pytest.raises(FastdiffError, match=message) as caught:
        sd[1](num_inference_steps=2, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["StableDiffusionUpscalePipeline", "StableDiffusionInstructPix2PixPipeline", "StableDiffusion3Pipeline"]
)
def test_pipelines_that_mean_something_else_by_the_same_parts_are_named(sd, tmp_path, name):
    """Their networks load, but read their extra channels otherwise."""
    index = json.loads((sd[2] / "model_index.json").read_text()) | {"_class_name": name}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=f"_class_name is '{name}'; supported"):
        load_folder(tmp_path)


def test_the_refiner_is_named(xl, tmp_path):
    index = json.loads((xl[2] / "model_index.json").read_text()) | {"requires_aesthetics_score": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="requires_aesthetics_score"):
        load_folder(tmp_path)


def test_foreign_folders_are_named(sd, tmp_path):
    with pytest.raises(ArtifactError, match="model_index.json"):
        load_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ArtifactError, match="FluxPipeline"):
        load_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}')
    with pytest.raises(ArtifactError, match="unet: no such folder"):
        load_folder(tmp_path)


def test_the_pipeline_loads_both_kinds_of_folders(sd, tmp_path):
    """And a sampler of ours by name walks what the scheduler's betas say."""
    pipe, _, folder = sd
    ours = fastdiff.Pipeline.from_pretrained(folder)
    assert isinstance(ours, TextToImage)
    call = {"num_inference_steps": 30, "generator": None, "seed": 2, "output_type": "pt"}
    named = ours("a cat", sampler="unipc:order=3", **call).images
    other = ours("a cat", sampler="dpmpp_3m", **call).images  # two roads to one solution
    assert float((named - other).abs().mean()) < 0.05 * float(named.std())
    theirs = tiny.quiet(diffusers.DDPMPipeline(
        tiny.plain_unet(), tiny.scheduler("DDPMScheduler", beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    ))  # fmt: skip
    theirs.save_pretrained(tmp_path)
    plain = fastdiff.Pipeline.from_pretrained(tmp_path)
    wanted = theirs(num_inference_steps=6, generator=tiny.generator(), output_type="np").images
    got = plain(num_inference_steps=6, generator=tiny.generator(), output_type="np").images
    assert difference(got, wanted) <= CLOSE
    assert plain(num_inference_steps=4, sampler="dpmpp_2m", seed=1, output_type="pt").images.isfinite().all()


def test_the_command_line_draws_from_a_prompt(sd, tmp_path, capsys):
    _, _, folder = sd
    picture(1).save(tmp_path / "photo.png")
    common = ["generate", "--model", str(folder), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*common, "--prompt", "a cat", "two dogs", "--negative-prompt", "fog"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert main([*common, "--prompt", "a cat", "--image", str(tmp_path / "photo.png"), "--strength", "0.9"]) == 0
    with Image.open(tmp_path / "out" / "000000.png") as drawn:
        assert drawn.size == (16, 24) and drawn.text["sampler"] == "DDIMScheduler"
    capsys.readouterr()
    wrong_calls = [
        (["--class-labels", "1"], "--class-labels"),
        ([], "--prompt"),
        (["--prompt", "a", "--image", str(folder)], str(folder)),
        (["--prompt", "a", "--height", "25"], "25"),
        (["--prompt", "a", "--sampler", "dimm"], "dimm"),
    ]
    for wrong, value in wrong_calls:
        assert main([*common, *wrong]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and value in said[0], said
    assert main(["generate", "--prompt", "a cat", "--out", str(tmp_path / "no")]) == 2
    assert "text-to-image" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_an_engine_draws_prompts_together_with_the_bits_they_have_alone(model, request):
    """Prompts, guidance, steps and samplers of any kind share a running batch; unplanned sizes are refused."""
    ours = request.getfixturevalue(model)[1]
    asked = [
        {"prompt": "a cat", "seed": 1, "num_inference_steps": 4},
        {"prompt": "two dogs", "seed": 2, "num_inference_steps": 6, "guidance_scale": 3.0, "negative_prompt": "red"},
        {"prompt": "a cat", "seed": 3, "num_inference_steps": 3, "guidance_scale": 1.0, "sampler": "ddim"},
        {"prompt": "x", "seed": 4, "num_inference_steps": 4, "height": 16, "width": 16, "image": picture(1)},
    ]
    with fastdiff.Engine(ours, max_batch=6, sizes=[(24, 16), (16, 16)]) as engine:
        own = [options if "height" in options else {**options, **SIZE} for options in asked]
        together = [engine.submit(**options) for options in own]
        for ticket, options in zip(together, own, strict=True):
            got = engine.images(ticket.result(60))
            assert torch.equal(got, engine.images(engine.submit(**options).result(60)))
            alone = ours(**options, output_type="pt").images
            assert (got - alone).abs().max() < CLOSE and alone.std() > 0.01
        with pytest.raises(ShapeError, match="was not planned for; allowed"):
            engine.submit(prompt="a cat", seed=1, height=32, width=32)
        with pytest.raises(PlanError, match="without mask"):
            engine.submit(prompt="a cat", seed=1, **SIZE, image=picture(1), mask_image=hole())
