"""The pipeline: labels in, pictures out, under the names the field knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import make_folder

from fastdiff import Pipeline
from fastdiff.errors import ArtifactError, BackendError, PlanError, ShapeError
from fastdiff.models.weights import MANIFEST

pytestmark = pytest.mark.fast
# Batch width changes how libraries sum, so the same image in another batch is equal only up to rounding.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "flow map": make_folder(root / "flow_map", two_time=True),
        "one time": make_folder(root / "one_time"),
        "no classes": make_folder(root / "no_classes", classes=False),
    }


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: Pipeline.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture
def pipe(pipes):
    return pipes["flow map"]


@pytest.mark.parametrize("labels", [3, -1, [0, 11], "1", [1.0], [True], [], None, [None, 0, 2]], ids=str)
def test_labels_are_checked(pipe, labels):
    if labels is None or labels == [None, 0, 2]:
        count = 1 if labels is None else 3
        assert pipe(labels, seed=0, output_type="pt").images.shape == (count, 1, 6, 6)
        return
    with pytest.raises(ShapeError) as caught:
        pipe(labels, seed=0)
    assert "allowed" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("repeat", [0, -1, True, 1.5, 5000])
def test_the_number_of_images_is_checked(pipe, repeat):
    with pytest.raises(ShapeError, match="allowed"):
        pipe(0, num_images_per_prompt=repeat)


def test_a_model_without_classes_takes_none(pipes):
    assert len(pipes["no classes"](num_images_per_prompt=2, seed=0).images) == 2
    with pytest.raises(ShapeError, match="class label is 0; allowed: none"):
        pipes["no classes"](0)
    with pytest.raises(PlanError, match="guidance_scale"):
        pipes["no classes"](guidance_scale=2.0)


def test_a_model_without_a_null_label_needs_labels(tmp_path):
    folder = make_folder(tmp_path)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"null_label": 3', '"null_label": null'))
    pipe = Pipeline.from_pretrained(folder)
    assert pipe([0, 2], seed=0, num_inference_steps=1, output_type="pt").images.shape[0] == 2
    with pytest.raises(ShapeError, match="class label is None; allowed: 0 to 2"):
        pipe(seed=0)


def test_output_types(pipe):
    kwargs = {"class_labels": [0, 1], "num_images_per_prompt": 2, "seed": 3}
    tensor = pipe(**kwargs, output_type="pt").images
    assert tensor.shape == (4, 1, 6, 6) and tensor.dtype == torch.float32  # 8 x 8 less a crop of 1 on each side
    assert 0 <= tensor.min() < tensor.max() <= 1
    array = pipe(**kwargs, output_type="np").images
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = pipe(**kwargs).images
    assert [(p.size, p.mode) for p in pictures] == [((6, 6), "L")] * 4
    np.testing.assert_array_equal(np.stack(pictures), (array[..., 0] * 255).round().astype(np.uint8))
    with pytest.raises(PlanError, match="output_type is 'latent'; allowed: pil, pt, np"):
        pipe(0, output_type="latent")


def test_three_channels_are_rgb(tmp_path):
    pipe = Pipeline.from_pretrained(make_folder(tmp_path, in_channels=3, out_channels=3))
    picture = pipe(0, seed=0, num_inference_steps=1).images[0]
    assert (picture.size, picture.mode) == ((6, 6), "RGB")


@pytest.mark.parametrize(("sampler", "options"), [("flow_map", {"gamma": 0.5}), ("ddim", {"eta": 1.0}), ("unipc", {})])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_seed_gives_the_same_image_alone_and_in_a_batch(pipe, sampler, options, guidance):
    kwargs = {"sampler": sampler, "num_inference_steps": 3, "guidance_scale": guidance, "output_type": "pt", **options}
    batch = pipe([2, 0, 1, 1], seed=40, **kwargs).images
    alone = torch.cat([pipe(label, seed=40 + i, **kwargs).images for i, label in enumerate([2, 0, 1, 1])])
    listed = pipe([1, 2], seed=[43, 40], **kwargs).images
    assert (batch - alone).abs().max() <= ROUNDING
    assert (listed - batch[[3, 0]]).abs().max() <= ROUNDING
    assert (batch[2] - batch[3]).abs().max() > 0.01  # another seed is another image
    assert torch.equal(batch, pipe([2, 0, 1, 1], seed=40, **kwargs).images)


def test_generators_draw_as_diffusers_does(pipe):
    kwargs = {"class_labels": [0, 1], "output_type": "pt"}

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    one = pipe(generator=seeded(1), **kwargs).images
    assert torch.equal(one, pipe(latents=torch.randn(2, 1, 8, 8, generator=seeded(1)), **kwargs).images)
    each = pipe(generator=[seeded(1), seeded(2)], **kwargs).images
    drawn = torch.cat([torch.randn(1, 1, 8, 8, generator=seeded(seed)) for seed in (1, 2)])
    assert torch.equal(each, pipe(latents=drawn, **kwargs).images)
    with pytest.raises(ShapeError, match="3 generators for a batch of 2"):
        pipe(generator=[seeded(i) for i in range(3)], **kwargs)
    with pytest.raises(PlanError, match="seed or generator"):
        pipe(generator=seeded(0), seed=0, **kwargs)


def test_latents_and_seeds_must_fit(pipe):
    for latents in (torch.zeros(3, 1, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 6), torch.tensor(0.0)):
        with pytest.raises(ShapeError, match="latents"):
            pipe([0, 1], latents=latents)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ShapeError, match="NaN"):
            pipe(0, latents=torch.full((1, 1, 8, 8), bad))
    with pytest.raises(ShapeError, match="2 seeds for a batch of 1"):
        pipe(0, seed=[1, 2])
    with pytest.raises(PlanError, match="seed is -1"):
        pipe(0, seed=-1)


@pytest.mark.parametrize(("kind", "steps", "sampler"), [("flow map", 4, "flow_map"), ("one time", 20, "dpmpp_2m")])
def test_the_default_sampler_and_steps(pipes, kind, steps, sampler):
    seen = []
    images = pipes[kind](1, seed=0, output_type="pt", callback_on_step_end=lambda *a: seen.append(a)).images
    assert len(seen) == steps
    named = pipes[kind](1, seed=0, output_type="pt", sampler=sampler, num_inference_steps=steps).images
    assert torch.equal(images, named)
    with pytest.raises(PlanError, match="needs a network that jumps"):
        pipes["one time"](1, sampler="flow_map")


def test_the_callback_gets_what_diffusers_gives_it(pipe):
    seen = []
    pipe(
        [0, 1], seed=0, num_inference_steps=4,
        callback_on_step_end=lambda *arguments: seen.append(arguments),
    )  # fmt: skip
    assert [number for _, number, _, _ in seen] == [0, 1, 2, 3]
    assert [float(timestep) for _, _, timestep, _ in seen] == [1000.0, 750.0, 500.0, 250.0]
    for who, _, _, tensors in seen:
        assert who is pipe and list(tensors) == ["latents"] and tensors["latents"].shape == (2, 1, 8, 8)
    heun = []
    pipe(0, seed=0, num_inference_steps=2, sampler="heun", callback_on_step_end=lambda *a: heun.append(a[2]))
    assert heun[0] == 1000.0 and heun[1] == 500.0  # a row for each network evaluation, at its own time


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 0},
        {"num_inference_steps": 2.0},
        {"sampler": "leapfrog"},
        {"grid": "trailing"},
        {"grid": "uniform", "timesteps": [500]},
        {"timesteps": [100, 200]},
        {"sigmas": [2.0, 1.0]},
        {"eta": 0.5},
        {"gamma": 1.5},
        {"guidance_scale": float("nan")},
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(pipe, options):
    with pytest.raises(PlanError) as caught:
        pipe(0, seed=0, **options)
    assert "\n" not in str(caught.value)


def test_explicit_times(pipe):
    kwargs = {"class_labels": 0, "seed": 0, "output_type": "pt", "sampler": "ddim"}
    grid = pipe(**kwargs, num_inference_steps=4).images
    assert torch.equal(grid, pipe(**kwargs, timesteps=[1000, 750, 500, 250]).images)
    assert torch.equal(grid, pipe(**kwargs, sigmas=[1.0, 0.75, 0.5, 0.25, 0.0]).images)


def test_loading_refuses_by_name(folders, tmp_path):
    with pytest.raises(ArtifactError, match="bundled models: .*digits"):
        Pipeline.from_pretrained("cifar")
    with pytest.raises(BackendError, match="unknown backend 'jax'"):
        Pipeline.from_pretrained(folders["one time"], backend="jax")
    with pytest.raises(ArtifactError, match="belongs to backend 'onnxruntime'"):
        Pipeline.from_pretrained(folders["one time"], artifact=tmp_path / "x.onnx")
    folder = make_folder(tmp_path / "m")
    for key, value in (("path", "straight"), ("prediction", "velocity")):
        text = (folder / MANIFEST).read_text()
        (folder / MANIFEST).write_text(text.replace(f'"{key}": "{value}"', f'"{key}": "sideways"'))
        with pytest.raises(ArtifactError, match=f"{key} is 'sideways'"):
            Pipeline.from_pretrained(folder)
        (folder / MANIFEST).write_text(text)


def test_the_bundled_model_draws(pipe):
    bundled = Pipeline.from_pretrained("digits")
    images = bundled([3, 8], seed=0, output_type="np").images
    assert images.shape == (2, 28, 28, 1) and images.max() > 0.9 and images.min() < 0.1
