"""Built folders of text-to-image models: the pipeline's pictures without its code, and nothing altered is run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="build needs onnx (pip install 'fastdiff[onnx]')")
pytest.importorskip("onnxruntime", reason="build needs onnxruntime (pip install 'fastdiff[onnx]')")
pytest.importorskip("transformers", reason="text encoders need transformers (pip install 'fastdiff[text]')")
pytest.importorskip("diffusers", reason="tiny models are made by diffusers (pip install 'fastdiff[test]')")
import tiny_pipelines as tiny  # noqa: E402
from tolerances import assert_no_worse_than  # noqa: E402

from fastdiff import Pipeline  # noqa: E402
from fastdiff.artifact import load_manifest  # noqa: E402
from fastdiff.built import BUILT, load_built, read_folder  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.cli.build import text_model  # noqa: E402
from fastdiff.errors import ArtifactError, BackendError, PlanError, ShapeError  # noqa: E402
from fastdiff.export import build_text as builder  # noqa: E402
from fastdiff.export.build import Wanted  # noqa: E402
from fastdiff.export.build_text import build_text_folder  # noqa: E402
from fastdiff.export.publish import Options  # noqa: E402
from fastdiff.export.symbol import FUNCTIONS  # noqa: E402
from fastdiff.export.targets import TARGETS  # noqa: E402
from fastdiff.export.text import export_text_encoder, write_tokenizer  # noqa: E402
from fastdiff.models.files import sha256  # noqa: E402
from fastdiff.text_to_image import load_folder  # noqa: E402

PRESETS = [Wanted(4), Wanted(3, "dpmpp_2m", 3.0), Wanted(3, "euler_ancestral", 1.0)]
PROMPTS = ["a cat", "two dogs, red"]


def saved(make, root):
    make(root).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module", params=["sd", "xl"])
def made(request, tmp_path_factory):
    """A model folder, and what was built from it."""
    root = tmp_path_factory.mktemp(request.param)
    model = saved(tiny.stable_diffusion if request.param == "sd" else tiny.stable_diffusion_xl, root)
    return model, root / "out", build_text_folder(text_model(model), root / "out", PRESETS)


@pytest.fixture(scope="module")
def built(made):
    return Pipeline.from_built(made[1])


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return saved(tiny.stable_diffusion, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sd_built(sd, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "out"
    build_text_folder(text_model(sd), out, [Wanted(2)])
    return out


@pytest.fixture
def copy(sd_built, tmp_path):
    return shutil.copytree(sd_built, tmp_path / "copy")


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(made):
    return [load_folder(made[0], backend="eager", dtype=dtype) for dtype in (torch.float32, torch.float64)]


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (None, {"num_inference_steps": 4}),
        ("dpmpp_2m-3", {"num_inference_steps": 3, "sampler": "dpmpp_2m", "guidance_scale": 3.0}),
        ("euler_ancestral-3", {"num_inference_steps": 3, "sampler": "euler_ancestral", "guidance_scale": 1.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "call", [{}, {"negative_prompt": "fog", "height": 24, "width": 16}, {"negative_prompt": ["a", ""]}], ids=str
)
def test_a_preset_is_the_pipeline(built, originals, preset, options, call):
    asked = {"prompt": PROMPTS, "seed": 5, "output_type": "pt", **call}
    plain, truth = (pipe(**options, **asked).images for pipe in originals)
    got = built(preset=preset, **asked).images
    assert got.std() > 0.01
    assert_no_worse_than(got, plain, truth.double())


def test_latents_seeds_and_repeats_mean_what_they_mean_in_a_call(built, originals):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for start in ({"latents": latents}, {"seed": [1, 2, 3, 4]}):
        asked = {"prompt": PROMPTS, "num_images_per_prompt": 2, "output_type": "pt", **start}
        plain, truth = (pipe(num_inference_steps=4, **asked).images for pipe in originals)
        assert_no_worse_than(built(**asked).images, plain, truth.double())
    first, _ = built("a cat", num_images_per_prompt=2, seed=8, output_type="np").images
    assert np.abs(built("a cat", seed=8, output_type="np").images[0] - first).max() < 1e-5
    (picture,) = built("a cat", seed=8).images
    assert picture.size == (16, 16)


def test_a_latent_consistency_model_reads_its_strength(tmp_path):
    sampler = tiny.scheduler("LCMScheduler", clip_sample=False, set_alpha_to_one=False)
    tiny.stable_diffusion(tmp_path, sampler, time_cond_proj_dim=8).save_pretrained(tmp_path / "model")
    build_text_folder(text_model(tmp_path / "model"), tmp_path / "out", [Wanted(4), Wanted(3, guidance_scale=1.0)])
    pipe, drawn = load_built(tmp_path / "out"), []
    for preset, options in (
        (None, {"num_inference_steps": 4}),
        ("LCMScheduler-3", {"num_inference_steps": 3, "guidance_scale": 1.0}),
    ):
        asked = {"prompt": PROMPTS, "seed": 5, "output_type": "pt"}
        plain, truth = (
            load_folder(tmp_path / "model", backend="eager", dtype=dtype)(**options, **asked).images
            for dtype in (torch.float32, torch.float64)
        )
        drawn.append(pipe(preset=preset, **asked).images)
        assert_no_worse_than(drawn[-1], plain, truth.double())
    assert (drawn[0] - drawn[1]).abs().max() > 0.01
    assert pipe.folder.presets[pipe.folder.default].guidance_scale == 7.5


# Every name of the models' code is there, and none of it runs; transformers is not there at all.
POISONED = """
import sys, types, torch
class Never(torch.nn.Module):
    def __init__(self, *_, **__):
        raise SystemExit("the model's code was run")
for name in ("unet", "autoencoder", "tiny_autoencoder", "controlnet"):
    module = types.ModuleType(f"fastdiff.models.{name}")
    module.__getattr__ = lambda name: Never
    sys.modules[module.__name__] = module
sys.modules["transformers"] = None
from fastdiff.cli import main
sys.exit(main(["generate", "--model", sys.argv[1], "--out", sys.argv[2], "--prompt", "a cat", "--seed", "3"]))
"""


def run_poisoned(*arguments):
    return subprocess.run([sys.executable, "-c", POISONED, *map(str, arguments)], capture_output=True, text=True)


def test_it_runs_without_the_models_code_or_transformers(sd, copy, tmp_path):
    from PIL import Image

    done = run_poisoned(copy, tmp_path / "png")
    assert done.returncode == 0, done.stderr
    (wanted,) = load_built(copy)("a cat", seed=3).images
    with Image.open(tmp_path / "png" / "000003.png") as got:
        assert np.array_equal(np.asarray(got), np.asarray(wanted)) and got.text["sampler"] == "DDIMScheduler"
    assert run_poisoned(sd, tmp_path / "other").returncode != 0, "the poison works"


def test_what_was_built_says_what_it_is(made):
    model, out, digest = made
    folder = read_folder(out)
    xl = len(folder.text.encoders) == 2
    scheduler = "EulerDiscreteScheduler" if xl else "DDIMScheduler"
    assert list(folder.presets) == [f"{scheduler}-4", "dpmpp_2m-3", "euler_ancestral-3"]
    assert folder.presets[folder.default].guidance_scale == (5.0 if xl else 7.5)
    assert folder.text.sized == xl and folder.text.grow == 2 and folder.shape == (4, 8, 8)
    assert set(folder.files) == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {BUILT}
    assert digest == sha256(out / BUILT)
    kinds = {words.graph: load_manifest(out / words.graph).kind for words in folder.text.encoders}
    assert set(kinds.values()) == {"text_encoder"} and load_manifest(out / folder.text.decoder).kind == "decoder"


def test_bad_requests_are_named(built, made):
    for options, error, says in (
        ({"preset": "ddim-9"}, PlanError, "preset is 'ddim-9'; this folder was built with"),
        ({"output_type": "latent"}, PlanError, "output_type is 'latent'; allowed: pil, pt, np"),
        ({"prompt": 3}, PlanError, "prompt is 3; allowed: a text, or a list of texts"),
        ({"prompt": []}, PlanError, "prompt is"),
        ({"negative_prompt": ["a", "b"]}, PlanError, "2 negative prompts for 1 prompts"),
        ({"height": 17}, ShapeError, "height is 17; allowed: multiples of 2"),
        ({"width": 2**20, "height": 2**20}, ShapeError, "at most 67108864 pixels"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, ShapeError, "latents is"),
        ({"seed": [1, 2]}, ShapeError, "2 seeds for a batch of 1"),
    ):
        with pytest.raises(error, match=says):
            built(**{"prompt": "a cat", **options})
    with pytest.raises(BackendError, match="backend is 'eager'; a built folder runs on: onnxruntime, tensorrt"):
        Pipeline.from_built(made[1], backend="eager")
    with pytest.raises(BackendError, match="an engine runs on an NVIDIA GPU"):
        Pipeline.from_built(made[1], backend="tensorrt")
    with pytest.raises(ArtifactError, match="load it with Pipeline.from_built"):
        Pipeline.from_pretrained(made[1])


def test_a_prompt_that_is_cut_is_logged_without_its_words(built, caplog):
    long, cut = (built(text, seed=1, output_type="pt").images for text in ("secret " * 9, "secret " * 9 + "cat"))
    assert torch.equal(long, cut) and "a prompt was cut to 16 tokens" in caplog.text and "secret" not in caplog.text


# --- what lies on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["unet.onnx", "unet.prepare.onnx", "decoder.onnx", "text_encoder_1.onnx", "tokenizer_1.json"]
)
def test_an_altered_file_is_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: its bytes are not those"):
        load_built(copy)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: no such file"):
        load_built(copy)


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v["text"].update(encoders=[]),
        lambda v: v["text"].update(encoders="x"),
        lambda v: v["text"].update(grow=0),
        lambda v: v["text"].update(grow=True),
        lambda v: v["text"].update(sized=1),
        lambda v: v["text"].update(strength_width=-1),
        lambda v: v["text"].update(decoder=["decoder.onnx"]),
        lambda v: v["text"].update(decoder="../decoder.onnx"),
        lambda v: v["text"].update(stranger=1),
        lambda v: v["text"].pop("decoder"),
        lambda v: v["text"]["encoders"][0].update(graph="decoder.onnx"),
        lambda v: v["text"]["encoders"][0].update(tokenizer="unet.onnx.json"),
        lambda v: v["text"]["encoders"][0].update(tokenizer="/etc/passwd"),
        lambda v: v["presets"]["DDIMScheduler-2"].update(kind="fused", table=None),
        lambda v: v["presets"]["DDIMScheduler-2"].update(graph="decoder.onnx"),
        lambda v: v.update(text=[]),
    ],
)
def test_a_description_that_cannot_be_is_refused(copy, edit):
    values = json.loads((copy / BUILT).read_text())
    edit(values)
    (copy / BUILT).write_text(json.dumps(values))
    with pytest.raises(ArtifactError):
        load_built(copy)


@pytest.mark.parametrize(
    "failing", ["export_unet", "export_decoder", "export_text_encoder", "write_tokenizer", "describe"]
)
def test_a_failing_build_leaves_nothing_behind(sd, tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise ArtifactError("it failed")

    monkeypatch.setattr(builder, failing, fail)
    with pytest.raises(ArtifactError, match="it failed"):
        build_text_folder(text_model(sd), tmp_path / "out", [Wanted(2)])
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from fastdiff.cli.build import text_model
from fastdiff.export import build_text
build_text.describe = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
build_text.build_text_folder(text_model(Path(sys.argv[1])), sys.argv[2], [build_text.Wanted(2)])
"""


def test_a_build_that_is_killed_leaves_no_folder_of_that_name(sd, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(sd), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()), "it was killed in the middle of it"
    build_text_folder(text_model(sd), tmp_path / "out", [Wanted(2)])
    load_built(tmp_path / "out")


def test_the_same_weights_give_the_same_bytes(sd, sd_built, tmp_path):
    build_text_folder(text_model(sd), tmp_path / "again", [Wanted(2)])
    assert (tmp_path / "again" / BUILT).read_bytes() == (sd_built / BUILT).read_bytes()


# --- what is built --------------------------------------------------------------------------------------------------


def test_half_precision_is_measured_and_draws(sd, tmp_path):
    build_text_folder(text_model(sd), tmp_path / "out", [Wanted(3)], torch.float16)
    graphs = {name: load_manifest(tmp_path / "out" / name) for name in ("unet.onnx", "text_encoder_1.onnx")}
    assert all(graph.dtype == "float16" and graph.parity for graph in graphs.values())
    half, whole = (
        pipe("a cat", seed=1, output_type="pt", **options).images
        for pipe, options in ((load_built(tmp_path / "out"), {}), (load_folder(sd), {"num_inference_steps": 3}))
    )
    assert 0 < (half - whole).abs().max() < 0.02


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("end", [None, 2], ids=["end", "legacy end"])
def test_text_encoders_are_transformers_own_for_every_target(tmp_path, target, end):
    """The export itself fails where they are not."""
    encoder = text_model(saved(tiny.stable_diffusion_xl, tmp_path)).encoders[1]
    if end is not None:
        encoder.model.text_model.eos_token_id = encoder.model.config.eos_token_id = end
    for penultimate in (False, True):
        options = Options(target=target)
        manifest = export_text_encoder(encoder, tmp_path / "t.onnx", penultimate=penultimate, options=options)
        assert manifest.outputs == {"tokens": ["float32", ["batch", 16, 16]], "pooled": ["float32", ["batch", 12]]}
        assert len(manifest.parity) == 2 and all(0 < case["exported"] < 1e-5 for case in manifest.parity.values())


def test_a_text_encoder_that_sees_what_comes_later_is_noticed(sd, tmp_path, monkeypatch):
    function = torch.nn.functional.scaled_dot_product_attention
    attend = FUNCTIONS[function]
    monkeypatch.setitem(FUNCTIONS, function, lambda *qkv, **_: attend(*qkv))
    encoder = text_model(sd).encoders[0]
    with pytest.raises(ArtifactError, match="the exported graph is off by"):
        export_text_encoder(encoder, tmp_path / "t.onnx")
    assert os.listdir(tmp_path) == []


def test_a_text_encoder_builds_with_tensorrt_for_rtx(sd, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="builds need TensorRT for RTX (pip install 'fastdiff[tensorrt-rtx]')")
    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))
    options = Options(torch.float16, "tensorrt-rtx")
    export_text_encoder(text_model(sd).encoders[0], tmp_path / "t.onnx", options=options)
    command = ["build", "--graph", str(tmp_path / "t.onnx"), "--out", str(tmp_path / "out"), "--engine", "sm89"]
    assert main([*command, "--bucket", "batch=1:2:4"]) == 0 and (tmp_path / "out" / "sm89" / "t.plan").is_file()


def test_a_tokenizer_that_gives_other_tokens_is_noticed(sd, tmp_path, monkeypatch):
    encoder = text_model(sd).encoders[0]
    file = tmp_path / "tokenizer.json"
    write_tokenizer(encoder, file)
    told = encoder.tokens(["a cat"])
    monkeypatch.setattr(encoder, "tokens", lambda prompts: told.expand(len(prompts), -1) + 1)
    with pytest.raises(ArtifactError, match="gives other tokens than the model's tokenizer for ''"):
        write_tokenizer(encoder, file)


def test_the_command_builds_and_the_next_one_draws(sd, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["build", "--model", str(sd), "--out", str(out), "--steps", "2", "--sampler", "ddim", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sha256"] == sha256(out / BUILT) and list(read_folder(out).presets) == ["ddim-2"]
    draw = ["generate", "--model", str(out), "--out", str(tmp_path / "png")]
    assert main([*draw, "--prompt", "a cat", "two dogs", "--negative-prompt", "fog", "--height", "24"]) == 0
    assert len(os.listdir(tmp_path / "png")) == 2
    capsys.readouterr()
    for wrong, says in (
        ([], "--prompt is missing"),
        (["--class-labels", "1"], "takes --prompt"),
        (["--prompt", "a", "--steps", "3"], "--steps is for models"),
        (["--prompt", "a", "--strength", "0.5"], "--strength is for models"),
        (["--prompt", "a", "--preset", "x"], "this folder was built with: ddim-2"),
    ):
        assert main([*draw, *wrong]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and says in said[0], said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fuse"], "holds one evaluation, not a whole sampler: leave --fuse out"),
        (["--format", "triton-server"], "--format is not for text-to-image models"),
        (["--bucket", "height=8:8:8"], "--bucket gives the sizes of engines; it needs --engine"),
        (["--steps", "2", "2"], "preset 'DDIMScheduler-2' is asked for twice"),
        (["--sampler", "dimm"], "unknown sampler"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_in_one_line(sd, tmp_path, options, says, capsys):
    assert main(["build", "--model", str(sd), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and says in said[0] and os.listdir(tmp_path) == [], said


def test_networks_that_read_more_than_text_are_refused(tmp_path):
    tiny.stable_diffusion(tmp_path / "a", in_channels=9).save_pretrained(tmp_path / "painting")
    with pytest.raises(PlanError, match="paints into a picture"):
        build_text_folder(text_model(tmp_path / "painting"), tmp_path / "out", [Wanted(2)])
    shutil.copytree(tmp_path / "painting", tmp_path / "control" / "controlnet")
    shutil.copy(tmp_path / "painting" / "model_index.json", tmp_path / "control")
    with pytest.raises(PlanError, match="has a ControlNet"):
        text_model(tmp_path / "control")
