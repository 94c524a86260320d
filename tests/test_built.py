"""Built folders: the same pictures without the model's code, whole or absent, and nothing altered is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import make_folder

pytest.importorskip("onnx", reason="build needs onnx (pip install 'fastdiff[onnx]')")
pytest.importorskip("onnxruntime", reason="build needs onnxruntime (pip install 'fastdiff[onnx]')")

from fastdiff import Pipeline  # noqa: E402
from fastdiff.built import BUILT, load_built, read_folder  # noqa: E402
from fastdiff.built.tables import from_json, to_json  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.errors import ArtifactError, BackendError, PlanError, ShapeError  # noqa: E402
from fastdiff.export import build as builder  # noqa: E402
from fastdiff.export.build import Wanted, build_folder  # noqa: E402
from fastdiff.models.files import sha256  # noqa: E402
from fastdiff.models.weights import load_model  # noqa: E402
from fastdiff.sampling.parts import make_solver, make_times  # noqa: E402
from fastdiff.sampling.path import PATHS  # noqa: E402
from fastdiff.sampling.prediction import PREDICTIONS  # noqa: E402
from fastdiff.sampling.solvers import SOLVERS  # noqa: E402
from fastdiff.sampling.table import build as build_table  # noqa: E402

ONE_LEVEL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
PRESETS = [Wanted(3, guidance_scale=2.0), Wanted(4, "dpmpp_2m"), Wanted(3, "ddpm"), Wanted(1, fused=True)]
LABELS = [0, 2, 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A flow map with its exported graph, and what was built from it."""
    root = tmp_path_factory.mktemp("built")
    model = make_folder(root / "model", two_time=True, **ONE_LEVEL)
    digest = build_folder(load_model(model), root / "out", PRESETS)
    shutil.copy(root / "out" / "unet.onnx", model)
    shutil.copy(root / "out" / "unet.onnx.json", model)
    return model, root / "out", digest


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "copy")


@pytest.fixture(scope="module")
def pipes(made):
    return Pipeline.from_pretrained(made[0], backend="onnxruntime"), Pipeline.from_built(made[1])


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (None, {"num_inference_steps": 3, "guidance_scale": 2.0}),
        ("dpmpp_2m-4", {"num_inference_steps": 4, "sampler": "dpmpp_2m"}),
        ("ddpm-3", {"num_inference_steps": 3, "sampler": "ddpm"}),
    ],
)
def test_a_preset_is_the_pipeline_bit_for_bit(pipes, preset, options):
    for labels in (LABELS, [1]):
        wanted = pipes[0](labels, seed=3, output_type="pt", **options).images
        got = pipes[1](labels, seed=3, output_type="pt", preset=preset).images
        assert torch.equal(got, wanted) and got.std() > 0.01


def test_a_preset_starts_from_latents_too(pipes):
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = pipes[0](LABELS, latents=latents, num_inference_steps=4, sampler="dpmpp_2m", output_type="np").images
    assert np.array_equal(pipes[1](LABELS, latents=latents, preset="dpmpp_2m-4", output_type="np").images, wanted)


def test_a_fused_preset_is_the_pipeline(pipes):
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for start in ({"seed": 3}, {"latents": latents}):
        wanted = pipes[0](LABELS, num_inference_steps=1, output_type="pt", **start).images
        got = pipes[1](LABELS, preset="flow_map-1-fused", output_type="pt", **start).images
        assert got.shape == wanted.shape and (got - wanted).abs().max() <= 1e-5


# Every name of the model's code is there, and none of it runs.
POISONED = """
import sys, types, torch
module = types.ModuleType("fastdiff.models.unet")
class Never(torch.nn.Module):
    def __init__(self, *_, **__):
        raise SystemExit("the model's code was run")
module.__getattr__ = lambda name: Never
sys.modules["fastdiff.models.unet"] = module
from fastdiff.cli import main
sys.exit(main(["generate", "--model", sys.argv[1], "--out", sys.argv[2], "--class-labels", "0", "2", "1", "--seed", "3"]
              + sys.argv[3:]))
"""


def run_poisoned(*arguments):
    return subprocess.run([sys.executable, "-c", POISONED, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("preset", ["flow_map-3", "flow_map-1-fused"])
def test_it_runs_without_the_models_code_or_weights(pipes, copy, tmp_path, preset):
    from PIL import Image

    done = run_poisoned(copy, tmp_path / "png", "--preset", preset)
    assert done.returncode == 0, done.stderr
    wanted = pipes[1](LABELS, seed=3, preset=preset).images
    for i, picture in enumerate(wanted):
        with Image.open(tmp_path / "png" / f"{3 + i:06d}.png") as got:
            assert np.array_equal(np.asarray(got), np.asarray(picture)) and got.text["steps"] == preset.split("-")[1]
    assert not list(copy.rglob("*.safetensors")) or [p.name for p in copy.rglob("*.safetensors")] == [
        "tables.safetensors"
    ]


def test_the_poison_works(made, tmp_path):
    done = run_poisoned(made[0], tmp_path / "png")
    assert done.returncode != 0 and "the model's code was run" in done.stderr


def test_what_was_built_says_what_it_is(made):
    folder = read_folder(made[1])
    assert list(folder.presets) == ["flow_map-3", "dpmpp_2m-4", "ddpm-3", "flow_map-1-fused"]
    assert folder.default == "flow_map-3" and folder.presets["flow_map-3"].guidance_scale == 2.0
    assert folder.shape == (1, 8, 8) and folder.classes == ("zero", "one", "two") and folder.null_label == 3
    assert set(folder.files) == {p.relative_to(made[1]).as_posix() for p in made[1].rglob("*") if p.is_file()} - {BUILT}
    assert made[2] == sha256(made[1] / BUILT)


def test_bad_requests_are_named(made, pipes):
    built = pipes[1]
    for options, error, says in (
        ({"preset": "ddim-9"}, PlanError, "preset is 'ddim-9'; this folder was built with: flow_map-3, dpmpp_2m-4"),
        ({"output_type": "jpg"}, PlanError, "output_type is 'jpg'"),
        ({"class_labels": 7}, ShapeError, "class label is 7; allowed: 0 to 2"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, ShapeError, "latents is"),
        ({"seed": [1, 2]}, ShapeError, "2 seeds for a batch of 1"),
    ):
        with pytest.raises(error, match=says):
            built(**{"class_labels": 1, **options})
    with pytest.raises(BackendError, match="backend is 'eager'; a built folder runs on: onnxruntime, tensorrt"):
        Pipeline.from_built(made[1], backend="eager")
    with pytest.raises(ArtifactError, match="load it with Pipeline.from_built"):
        Pipeline.from_pretrained(made[1])
    with pytest.raises(BackendError, match="an engine runs on an NVIDIA GPU; device is 'cpu'"):
        Pipeline.from_built(made[1], backend="tensorrt")


@pytest.mark.parametrize("name", ["unet.onnx", "tables.safetensors", "flow_map-1-fused.onnx"])
def test_an_altered_file_is_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: its bytes are not those built.json describes"):
        load_built(copy)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: no such file"):
        load_built(copy)


def change(folder: Path, edit) -> None:
    values = json.loads((folder / BUILT).read_text())
    edit(values)
    (folder / BUILT).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v.update(format=2),
        lambda v: v.pop("presets"),
        lambda v: v.update(shape=[1, 8]),
        lambda v: v.update(shape=[1, 8, -8]),
        lambda v: v.update(crop=4),
        lambda v: v.update(default="none"),
        lambda v: v.update(stranger=1),
        lambda v: v["presets"]["flow_map-3"].update(kind="other"),
        lambda v: v["presets"]["flow_map-3"].update(scale="1"),
        lambda v: v["presets"]["flow_map-3"].update(graph="../unet.onnx"),
        lambda v: v["presets"]["flow_map-3"].update(graph="missing.onnx"),
        lambda v: v["presets"]["flow_map-3"]["table"].update(history=9),
        lambda v: v["presets"]["flow_map-3"]["table"]["rows"].pop(),
        lambda v: v["presets"]["flow_map-3"]["table"]["rows"][0].update(x=[99]),
        lambda v: v["presets"]["flow_map-3"]["table"]["rows"][0].update(x=None),
        lambda v: v["presets"]["flow_map-3"]["table"]["rows"][0].update(guided={"projected": 1}),
        lambda v: v["presets"]["flow_map-3"]["table"]["rows"][0].update(
            guided=dict.fromkeys(("weak_noise", "rescaled", "optimal", "projected", "momentum"), True)
        ),
        lambda v: v["presets"]["flow_map-3"].update(sampler=1),
        lambda v: v["files"]["unet.onnx"].update(bytes="1"),
    ],
)
def test_a_description_that_cannot_be_is_refused(copy, edit):
    change(copy, edit)
    with pytest.raises(ArtifactError):
        load_built(copy)


def test_trust_is_for_one_description(made, copy):
    assert read_folder(copy, trust=made[2]).trusted and not read_folder(copy).trusted
    change(copy, lambda values: values.update(crop=0))
    with pytest.raises(ArtifactError, match="not the .* that is trusted"):
        load_built(copy, trust=made[2])


@pytest.mark.parametrize("failing", ["export_unet", "write_tensors", "describe"])
def test_a_failing_build_leaves_nothing_behind(made, tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise ArtifactError("it failed")

    monkeypatch.setattr(builder, failing, fail)
    with pytest.raises(ArtifactError, match="it failed"):
        build_folder(load_model(made[0]), tmp_path / "out", PRESETS[:1])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ([], "one preset or more"),
        ([Wanted(2), Wanted(2)], "'flow_map-2' is asked for twice"),
        ([Wanted(2, "euler_ancestral_x")], "unknown sampler"),
        ([Wanted(2, "ddpm", fused=True)], "draws noise"),
    ],
)
def test_presets_that_cannot_be_are_refused(made, tmp_path, wanted, says):
    with pytest.raises(PlanError, match=says):
        build_folder(load_model(made[0]), tmp_path / "out", wanted)
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(made):
    with pytest.raises(ArtifactError, match="exists already"):
        build_folder(load_model(made[0]), made[1], PRESETS[:1])


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_table_comes_back_from_disk(name):
    jumps = make_solver(name, {}).jumps
    prediction = PREDICTIONS["mean_velocity" if jumps else "velocity"]
    path = PATHS["straight"]()
    times = make_times(path, 4, timesteps=[900.0, 600.0, 300.0])  # not from pure noise: one solver cannot start there
    table = build_table(path, prediction, make_solver(name, {}), times, guidance=2.0, clip=1.0)
    back = from_json(json.loads(json.dumps(to_json(table.structure))), table.values, "test")
    assert back.structure == table.structure and torch.equal(back.values, table.values)


def test_the_command_builds_and_the_next_one_draws(made, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["build", "--model", str(made[0]), "--out", str(out), "--steps", "2", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sha256"] == sha256(out / BUILT) and list(read_folder(out).presets) == ["flow_map-2", "flow_map-3"]
    draw = ["generate", "--model", str(out), "--out", str(tmp_path / "png")]
    assert main([*draw, "--preset", "flow_map-3"]) == 0 and len(os.listdir(tmp_path / "png")) == 3
    capsys.readouterr()
    assert main([*draw, "--sampler", "ddim"]) == 2
    assert "--sampler is for models" in capsys.readouterr().err
    assert main(["generate", "--model", str(made[0]), "--preset", "x"]) == 2
    assert "--preset is for folders that fastdiff build made" in capsys.readouterr().err


@pytest.fixture(scope="module")
def with_engines(made, tmp_path_factory):
    """The same with engines, made by TensorRT for RTX; whoever made them is a stranger here."""
    pytest.importorskip("tensorrt_rtx", reason="builds need TensorRT for RTX (pip install 'fastdiff[tensorrt-rtx]')")
    from fastdiff.backends.trt_library import find_library
    from fastdiff.export.plan_cache import PlanCache

    root = tmp_path_factory.mktemp("engines")
    (root / "user").mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(root / "user"))
        cache = PlanCache(root / "plans", find_library("tensorrt_rtx"))
        engines = builder.Engines(cache, ("sm86", "sm120"), batch=(1, 2, 4))
        digest = build_folder(load_model(made[0]), root / "out", PRESETS[:2], engines)
    return root, digest


@pytest.fixture
def gpu(monkeypatch):
    """Loading goes as far as the library, which finds no driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))


def test_engines_lie_beside_the_graphs(with_engines):
    from fastdiff.backends.plan_files import load_manifest

    root, _ = with_engines
    folder = read_folder(root / "out")
    for preset in folder.presets.values():
        assert preset.plans == {"sm86": "sm86/unet.plan", "sm120": "sm120/unet.plan"}
    manifest = load_manifest(root / "out" / "sm86" / "unet.plan")
    # guidance asks for both estimates at once, so twice the batch
    assert manifest.profiles[0]["sample"] == [
        [1, 1, 8, 8],
        [4, 1, 8, 8],
        [8, 1, 8, 8],
    ]
    assert manifest.graph["kind"] == "unet" and manifest.architectures == ("sm86",)
    assert folder.file("sm86/unet.plan").is_file() and len(list((root / "plans").glob("*/model.plan"))) == 2


def test_engines_of_a_stranger_need_trust(with_engines, gpu, tmp_path, monkeypatch):
    root, digest = with_engines
    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))
    how = {"device": "cuda", "backend": "tensorrt"}
    with pytest.raises(ArtifactError, match="was not sealed by this user's cache"):
        load_built(root / "out", **how)
    with pytest.raises(BackendError, match="TensorRT for RTX refuses it: .*CUDA"):  # as far as it goes without a GPU
        load_built(root / "out", trust=digest, **how)
    monkeypatch.setenv("FASTDIFF_CACHE", str(root / "user"))
    with pytest.raises(BackendError, match="TensorRT for RTX refuses it"):
        load_built(root / "out", **how)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(BackendError, match="has engines for sm86, sm120; this GPU is sm90"):
        load_built(root / "out", **how)


def test_the_command_builds_engines_of_an_export(made, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="builds need TensorRT for RTX (pip install 'fastdiff[tensorrt-rtx]')")
    from fastdiff.backends.plan_files import load_manifest
    from fastdiff.export.onnx import Options, export_unet

    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))
    file, out = tmp_path / "net.onnx", tmp_path / "out"
    export_unet(load_model(made[0]), file, split=True, options=Options(target="tensorrt-rtx"))
    command = ["build", "--graph", str(file), "--out", str(out), "--engine", "sm89", "--json"]
    sizes = ["height=8:8:8", "width=8:8:8", "rows=1:4:20"]
    assert main([*command, "--bucket", "batch=1:2:4", *sizes, "--bucket", "batch=8:8:8", *sizes]) == 0
    assert json.loads(capsys.readouterr().out)["plans"] == ["sm89/net.plan", "sm89/net.prepare.plan"]
    step, prepare = (load_manifest(out / "sm89" / f"{name}.plan") for name in ("net", "net.prepare"))
    assert len(step.profiles) == 2 and len(prepare.profiles) == 1  # which has no batch
    for wrong, says in (
        (["--bucket", "batch=1:2"], "--bucket batch=1:2: allowed is DIM=MIN:USUAL:MAX"),
        (["--bucket", "depth=1:2:3"], "bounds dimension 'depth'; the graph's: batch, height, rows, width"),
        (["--bucket", "batch=1:2:3"], "does not bound dimension 'height'"),
        ([], "--graph needs --engine, and one --bucket or more"),
    ):
        assert main([*command[:4], str(tmp_path / "other"), *command[5:], *wrong]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
