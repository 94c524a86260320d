"""Calibrating text-to-image models: prompts, strengths of guidance, adapters."""

from __future__ import annotations

import pytest
import torch

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
        pipe("a cat", sampler="calibrated", guidance_scale=4.0, **GIVEN)  # 50 steps unless told otherwise


def test_the_command_takes_the_number_of_steps_from_the_file(folder, tmp_path):
    asked = ["--sampler", "calibrated", "--guidance-scale", "4", "--prompt", "a cat", "--height", "16", "--width", "16"]
    assert main(["generate", "--model", str(folder), *asked, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_it_needs_prompts(folder):
    with pytest.raises(PlanError, match="calibrated with prompts"):
        fastdiff.calibrate(fastdiff.Pipeline.from_pretrained(folder), steps=(3,), settings=FEW)


def test_changed_weights_are_another_network(folder):
    pipe = fastdiff.Pipeline.from_pretrained(folder)
    with torch.no_grad():
        next(pipe.parts.unet.parameters()).add_(0.01)
    with pytest.raises(ArtifactError, match="calibration is of the network"):
        pipe.load_calibration()
    assert pipe.load_calibration(force=True).timesteps(3)[0] == pytest.approx(999, abs=1)
