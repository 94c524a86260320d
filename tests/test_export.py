"""Exported files: the same numbers in another runtime, bound to their weights, whole or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from small import make_folder

pytest.importorskip("onnx", reason="export needs onnx (pip install 'fastdiff[onnx]')")
pytest.importorskip("onnxruntime", reason="export needs onnxruntime (pip install 'fastdiff[onnx]')")

from fastdiff import Pipeline  # noqa: E402
from fastdiff.artifact import load_manifest, manifest_path  # noqa: E402
from fastdiff.backends.ort_session import open_session  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.errors import ArtifactError, PlanError  # noqa: E402
from fastdiff.export import parity  # noqa: E402
from fastdiff.export import publish as exporter  # noqa: E402
from fastdiff.export.onnx import export_sampler, export_unet  # noqa: E402
from fastdiff.export.targets import target_of  # noqa: E402
from fastdiff.models.files import sha256  # noqa: E402
from fastdiff.models.weights import fingerprint, load_model  # noqa: E402

ONE_LEVEL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
CLOSE = 1e-4  # absolute, on images in [0, 1]: two libraries, several steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A flow map with its exported network beside it."""
    folder = make_folder(tmp_path_factory.mktemp("export") / "model", two_time=True)
    export_unet(load_model(folder), folder / "unet.onnx")
    return folder


@pytest.fixture(scope="module")
def pipes(folder):
    return Pipeline.from_pretrained(folder), Pipeline.from_pretrained(folder, backend="onnxruntime")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_one_file_serves_every_batch(pipes, batch):
    images = [pipe([i % 3 for i in range(batch)], seed=1, output_type="pt").images for pipe in pipes]
    assert images[0].shape == (batch, 1, 6, 6) and images[0].std() > 0.01
    assert (images[0] - images[1]).abs().max() <= CLOSE


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpmpp_2m", "num_inference_steps": 5},
        {"sampler": "heun", "num_inference_steps": 3, "guidance_scale": 2.0},
        {"sampler": "ddim", "eta": 1.0, "num_inference_steps": 4, "guidance_scale": lambda t: 2.0 if t > 0.5 else 1.0},
        {"sampler": "flow_map", "gamma": 0.5},
    ],
    ids=["dpmpp_2m", "guided heun", "ddim with a guidance interval", "flow_map with noise"],
)
def test_onnxruntime_samples_like_torch(pipes, options):
    images = [pipe([0, 2, None], seed=3, output_type="pt", **options).images for pipe in pipes]
    assert (images[0] - images[1]).abs().max() <= CLOSE


def test_the_manifest_says_what_the_file_is(folder):
    manifest = load_manifest(folder / "unet.onnx")
    assert manifest.kind == "unet" and manifest.opset == target_of("onnxruntime").opset
    assert manifest.inputs == {
        "sample": ["float32", ["batch", 1, "height", "width"]],
        "timestep": ["float32", ["batch"]],
        "class_labels": ["int64", ["batch"]],
        "target": ["float32", ["batch"]],
    }
    assert manifest.outputs == {"output": ["float32", ["batch", 1, "height", "width"]]}
    assert manifest.sha256 == sha256(folder / "unet.onnx") and manifest.model_sha256 == fingerprint(folder)
    assert set(manifest.parity) == {"batch 1, 8x8", "batch 2, 8x4", "batch 3, 4x8"}
    assert all(error["exported"] < 1e-5 for error in manifest.parity.values())
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


def test_a_changed_file_is_refused(copy):
    file = copy / "unet.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    for changed in (bytes(content), bytes(content)[:-1], b""):
        file.write_bytes(changed)
        with pytest.raises(ArtifactError, match="not those its manifest describes"):
            Pipeline.from_pretrained(copy, backend="onnxruntime")
    file.unlink()
    with pytest.raises(ArtifactError, match="fastdiff export --model"):
        Pipeline.from_pretrained(copy, backend="onnxruntime")


@pytest.mark.parametrize("change", [{"format": 2}, {"stranger": 1}, None], ids=str)
def test_a_manifest_that_is_none_is_refused(copy, change):
    file = manifest_path(copy / "unet.onnx")
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match="unet.onnx.json"):
        Pipeline.from_pretrained(copy, backend="onnxruntime")


def test_a_file_made_from_other_weights_is_refused(folder, tmp_path):
    other = make_folder(tmp_path / "other", two_time=True, seed=1)
    with pytest.raises(ArtifactError, match="was made from other weights"):
        Pipeline.from_pretrained(other, backend="onnxruntime", artifact=folder / "unet.onnx")


def test_a_file_whose_second_time_came_from_other_weights_is_refused(copy):
    other = make_folder(copy.parent / "other", two_time=True, seed=1)
    shutil.copy(other / "target_embedding.safetensors", copy)
    with pytest.raises(ArtifactError, match="was made from other weights"):
        Pipeline.from_pretrained(copy, backend="onnxruntime")


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_a_fused_flow_map_is_the_pipeline(tmp_path, strength):
    folder, file = make_folder(tmp_path / "model", two_time=True, **ONE_LEVEL), tmp_path / "sampler.onnx"
    manifest = export_sampler(load_model(folder), file, 2, guidance_scale=strength)
    assert manifest.kind == "sampler"
    assert manifest.sampler == {"name": "flow_map", "num_inference_steps": 2, "guidance_scale": strength}
    session, pipe = open_session(file, torch.device("cpu")), Pipeline.from_pretrained(folder)
    for batch in (1, 4):
        noise, labels = torch.randn(batch, 1, 8, 8), [i % 3 for i in range(batch)]
        (got,) = session.run(None, {"noise": noise.numpy(), "class_labels": np.array(labels)})
        wanted = pipe(labels, latents=noise, num_inference_steps=2, guidance_scale=strength, output_type="pt").images
        assert np.abs((got / 2 + 0.5) - wanted.numpy()).max() <= CLOSE
    with pytest.raises(ArtifactError, match="holds a sampler"):
        Pipeline.from_pretrained(folder, backend="onnxruntime", artifact=file)


def test_a_fused_one_time_sampler_from_the_command_line(tmp_path, capsys):
    folder = make_folder(tmp_path / "plain", classes=False, **ONE_LEVEL)
    file = tmp_path / "sampler.onnx"
    assert main(["export", "--model", str(folder), "--fuse-sampler", "2", "--out", str(file), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == "" and report["kind"] == "sampler" and list(report["inputs"]) == ["noise"]
    noise = torch.randn(3, 1, 8, 8)
    (got,) = open_session(file, torch.device("cpu")).run(None, {"noise": noise.numpy()})
    pipe = Pipeline.from_pretrained(folder)
    wanted = pipe(num_images_per_prompt=3, latents=noise, num_inference_steps=2, output_type="pt").images
    assert np.abs((got / 2 + 0.5) - wanted.numpy()).max() <= CLOSE
    assert main(["inspect", str(file)]) == 0
    assert "dpmpp_2m" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_sde"])
def test_a_stochastic_sampler_is_refused(folder, tmp_path, name):
    with pytest.raises(PlanError, match=f"'{name}' draws noise"):
        export_sampler(load_model(folder), tmp_path / "x.onnx", 2, name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ["write_graph", "check", "compare", "save_manifest"])
def test_a_failing_export_leaves_nothing_behind(folder, tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise ArtifactError("it failed")

    monkeypatch.setattr(exporter, failing, fail)
    with pytest.raises(ArtifactError, match="it failed"):
        export_unet(load_model(folder), tmp_path / "new.onnx")
    assert os.listdir(tmp_path) == []


def test_parity_refuses_a_file_that_does_not_run(folder, tmp_path, monkeypatch):
    class OneBatch:
        def get_inputs(self):
            return []

        get_outputs = get_inputs

        def run(self, *_):
            raise RuntimeError("Got: 1\nExpected: 2")

    monkeypatch.setattr(parity, "open_session", lambda *_, **__: OneBatch())
    with pytest.raises(ArtifactError, match="does not run at batch 1, 8x8: Got: 1 Expected: 2"):
        export_unet(load_model(folder), tmp_path / "x.onnx")
    assert os.listdir(tmp_path) == []


def test_parity_names_the_first_layer_that_is_not_the_networks(folder, tmp_path, monkeypatch):
    """The weights of one layer are spoiled on their way into the file."""
    write = exporter.write_graph

    def spoiled(graph, *places):
        bad = "up_blocks.0.resnets.1.conv1.weight"
        weight = graph.weights[bad]
        graph.weights[bad] = dataclasses.replace(weight, source=weight.source * 1.01)
        return write(graph, *places)

    monkeypatch.setattr(exporter, "write_graph", spoiled)
    with pytest.raises(ArtifactError, match=r"off by .*leaves the bound: up_blocks.0.resnets.1.conv1$"):
        export_unet(load_model(folder), tmp_path / "wrong.onnx")
    assert os.listdir(tmp_path) == []


def test_the_command_line_takes_types_targets_and_parts(folder, tmp_path, capsys):
    file = tmp_path / "half.onnx"
    options = ["--dtype", "float16", "--target", "tensorrt-rtx", "--split", "--external-data", "--per-layer"]
    assert main(["export", "--model", str(folder), "--out", str(file), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "step" and report["parity"]["layers"] and report["ranges"]["kept_in_float32"] == {}
    assert report["files"] == ["half.onnx.data", "half.prepare.onnx", "half.prepare.onnx.data"]
    assert main(["export", "--model", str(folder), "--out", str(tmp_path / "b.onnx"), "--dtype", "bfloat16"]) == 0
    assert "does not compute in it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--sampler", "ddim"], "--sampler belongs to --fuse-sampler N"),
        (["--part", "decoder", "--size", "8", "8"], "--size is for --part unet, not decoder"),
        (["--fuse-sampler", "2", "--split"], "--split does not go with --fuse-sampler"),
        (["--part", "decoder", "--control"], "--control is for --part unet, not decoder"),
        (["--opset", "9"], "opset is 9; allowed for torch.float32: 18 to 23"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folder, tmp_path, capsys, options, problem):
    assert main(["export", "--model", str(folder), "--out", str(tmp_path / "x.onnx"), *options]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_text_model_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fastdiff[test]')")
    pytest.importorskip("transformers", reason="needs transformers (pip install 'fastdiff[text]')")
    import tiny_pipelines as tiny

    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    commands = {"unet.onnx": [], "decoder.onnx": ["--part", "decoder"], "text_encoder.onnx": ["--part", "text-encoder"],
                "sampler.onnx": ["--fuse-sampler", "2", "--size", "6", "8"]}  # fmt: skip
    for name, options in commands.items():
        file = tmp_path / name
        assert main(["export", "--model", str(tmp_path / "model"), "--out", str(file), "--json", *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["kind"] == {"unet": "step"}.get(file.stem, file.stem) and report["parity"]
    assert report["outputs"]["latents"][1] == ["batch", 4, 6, 8]
    assert main(["export", "--model", str(tmp_path / "model"), "--part", "text-encoder-2"]) == 2
    assert "--part is text-encoder-2; this model has 1 text encoder" in capsys.readouterr().err
