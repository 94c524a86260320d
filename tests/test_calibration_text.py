"""Calibrating text-to-image models: prompts, strengths of guidance, adapters."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="text encoders need transformers (pip install 'fastdiff[text]')")
pytest.importorskip("diffusers", reason="tiny models are made by diffusers (pip install 'fastdiff[test]')")
import tiny_pipelines as tiny

import fastdiff
from fastdiff.calibration import Settings, classical
from fastdiff.cli import main
from fastdiff.errors import ArtifactError, PlanError

FEW = Settings(samples=2, held_out=2, batch_size=2, teacher_steps=12, iterations=1, share=2)
GIVEN = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion 1.5 with its calibration at a strength of 3 to 5."""
    root = tmp_path_factory.mktemp("sd")
    tiny.stable_diffusion(root).save_pretrained(root / "model")
    root = root / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classical, "grids", lambda family: {"trailing": classical.GRIDS["trailing"]})
        patch.setattr(classical, "SOLVERS", ("ddim", "dpmpp_2m"))
        patch.setattr(classical, "SCOUTS", ("ddim",))
        fastdiff.calibrate(
            fastdiff.Pipeline.from_pretrained(root), steps=(3,), inputs=["a cat", "a dog", "blue"], settings=FEW,
            guidance_scale=(3.0, 5.0), out=root / "calibration.json", **GIVEN,
        )  # fmt: skip
    return root


def test_prompts_are_drawn_by_it(folder):
    pipe = fastdiff.Pipeline.from_pretrained(folder)
    seen = []
    latents = pipe(
        ["a cat", "red"], sampler="calibrated", num_inference_steps=3, guidance_scale=4.0, seed=1, output_type="latent",
        callback_on_step_end=lambda *a: seen.append(a[1]), **GIVEN,
    ).images  # fmt: skip
    assert latents.isfinite().all() and len(seen) == 3
    by_hand = pipe(
        "red", sampler=pipe.load_calibration(), num_inference_steps="auto", tolerance=1e6, guidance_scale=4.0, seed=2,
        output_type="latent", **GIVEN,
    ).images  # fmt: skip
    assert torch.allclose(by_hand[0], latents[1], atol=1e-4)
    with pytest.raises(PlanError, match="made for 3 to 5"):
        pipe("a cat", sampler="calibrated", num_inference_steps=3, guidance_scale=7.5, **GIVEN)
    with pytest.raises(PlanError, match="this calibration has 3"):
        pipe("a cat", sampler="calibrated", num_inference_steps=50, guidance_scale=4.0, **GIVEN)
    told = pipe("red", sampler="calibrated", guidance_scale=4.0, seed=2, output_type="latent", **GIVEN).images
    assert torch.equal(told, by_hand)  # the most accurate unless told otherwise


def test_the_command_takes_the_number_of_steps_from_the_file(folder, tmp_path):
    asked = ["--sampler", "calibrated", "--guidance-scale", "4", "--prompt", "a cat", "--height", "16", "--width", "16"]
    assert main(["generate", "--model", str(folder), *asked, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_it_needs_prompts(folder):
    with pytest.raises(PlanError, match="calibrated with prompts"):
        fastdiff.calibrate(fastdiff.Pipeline.from_pretrained(folder), steps=(3,), settings=FEW)


def test_other_weights_are_another_network(folder, tmp_path):
    file = shutil.copytree(folder, tmp_path / "other") / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"] + 0.01}, file)
    pipe = fastdiff.Pipeline.from_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="calibration is of the network"):
        pipe.load_calibration()
    assert 900 < pipe.load_calibration(force=True).timesteps(3)[0] <= 999


def test_the_same_weights_in_another_type_are_the_same_network(folder):
    pipe = fastdiff.Pipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert pipe.load_calibration().calibration.fitted.keys() == {3}


def test_folders_of_diffusers_pipelines_without_prompts(tmp_path):
    """The network lies in a folder of its own inside the model's, the calibration beside it."""
    import diffusers

    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
                                 down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                                 layers_per_block=1, norm_num_groups=4)  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    small = ["--samples", "2", "--held-out", "2", "--batch-size", "2", "--teacher-steps", "12", "--iterations", "1"]
    assert main(["calibrate", "--model", str(tmp_path / "ddpm"), "--steps", "2", *small]) == 0
    assert (tmp_path / "ddpm" / "calibration.json").is_file()
    arguments = ["--sampler", "calibrated", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["generate", "--model", str(tmp_path / "ddpm"), *arguments]) == 0
