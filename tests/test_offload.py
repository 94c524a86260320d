"""Networks on the device only while they run, and decoding in tiles: same pictures, less memory.

On a CPU the "device" is other memory of the host: what runs is a copy, and where it lies can be told.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from tiny_pipelines import stable_diffusion, stable_diffusion_xl
from torch import nn

from fastdiff.errors import BackendError, PlanError
from fastdiff.pipeline import Pipeline
from fastdiff.text_to_image.offload import Offload

pytest.importorskip("transformers")
SIZE = {"num_inference_steps": 3, "seed": 1, "output_type": "np"}


@pytest.fixture(scope="module", params=[stable_diffusion, stable_diffusion_xl], ids=["sd", "xl"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny")
    request.param(made).save_pretrained(made / "pipe")
    return made / "pipe"


def test_a_stage_brings_copies_and_drops_them():
    layer = nn.Linear(3, 2)
    kept, parameter = layer.weight.data_ptr(), layer.weight
    with Offload(torch.device("cpu"))(layer):
        assert layer.weight is parameter and layer.weight.data_ptr() != kept
        there = layer.weight.data_ptr()
    assert layer.weight.data_ptr() == kept != there
    with pytest.raises(RuntimeError, match="breaks off"), Offload(torch.device("cpu"))(layer):
        raise RuntimeError("breaks off")
    assert layer.weight.data_ptr() == kept, "also where a stage breaks off"


def parts_of(pipe):
    networks = {"unet": pipe.parts.unet, "vae": pipe.parts.vae}
    return networks | {f"text {i}": encoder.model for i, encoder in enumerate(pipe.parts.text_encoders)}


@pytest.mark.parametrize("backend", ["eager", "captured", "captured_loop"])
def test_the_same_pictures_with_one_stage_there_at_a_time(folder, backend):
    plain, pipe = (Pipeline.from_pretrained(folder, backend=name) for name in ("eager", backend))
    pipe.enable_model_cpu_offload("cpu")
    homes = {name: next(network.parameters()).data_ptr() for name, network in parts_of(pipe).items()}
    seen = []

    def away() -> set[str]:
        return {name for name, part in parts_of(pipe).items() if next(part.parameters()).data_ptr() != homes[name]}

    for name, network in parts_of(pipe).items():
        network.register_forward_pre_hook(lambda *_, name=name: seen.append((name, away())))
    pipe.parts.unet.conv_out.register_forward_pre_hook(lambda *_: seen.append(("unet", away())))
    wanted = [plain(text, **SIZE).images for text in ("a cat", "a dog")]
    got = [pipe(text, **SIZE).images for text in ("a cat", "a dog")]
    for one, other in zip(got, wanted, strict=True):
        assert np.abs(one - other).max() < 1e-4
    assert not away()
    encoders = {name for name in homes if name.startswith("text")}
    assert seen and all(there == (encoders if name in encoders else {name}) for name, there in seen)


def test_what_was_captured_goes_with_the_weights(folder):
    pipe = Pipeline.from_pretrained(folder, backend="captured")
    pipe.enable_model_cpu_offload("cpu")
    pipe("a cat", **SIZE)
    assert not pipe.network.trunk._plans
    gc.collect()


def test_pictures_that_calls_start_from(folder):
    plain, pipe = Pipeline.from_pretrained(folder, backend="eager"), Pipeline.from_pretrained(folder, backend="eager")
    pipe.enable_model_cpu_offload("cpu")
    image = torch.rand(1, 3, 16, 16)
    wanted, got = (each("a cat", image=image, strength=0.7, **SIZE).images for each in (plain, pipe))
    assert np.abs(got - wanted).max() < 1e-4


def test_what_offloaded_networks_cannot_do(folder):
    pipe = Pipeline.from_pretrained(folder, backend="eager")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="torch sees no GPU"):
            pipe.enable_model_cpu_offload()
    pipe.enable_model_cpu_offload("cpu")
    with pytest.raises(PlanError, match="cannot be walked from outside"):
        pipe.ready("a cat")


def test_decoding_in_tiles(folder, monkeypatch):
    pipe = Pipeline.from_pretrained(folder, backend="eager")
    told = {"height": 64, "width": 64} | SIZE
    whole, sizes = pipe("a cat", **told).images, []
    original = type(pipe.parts.vae)._decode_tile
    monkeypatch.setattr(
        type(pipe.parts.vae), "_decode_tile", lambda vae, x: sizes.append(tuple(x.shape[2:])) or original(vae, x)
    )
    pipe.enable_vae_tiling(24)
    tiled = pipe("a cat", **told).images
    assert set(sizes) == {(24, 24)} and tiled.shape == whole.shape and np.abs(tiled - whole).mean() < 0.1
    pipe.disable_vae_tiling()
    assert np.array_equal(pipe("a cat", **told).images, whole)
    with pytest.raises(PlanError, match="tile is 16; allowed for this autoencoder: whole numbers from 17"):
        pipe.enable_vae_tiling(16)
