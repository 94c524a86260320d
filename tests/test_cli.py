"""The command line, in process: exit codes, one line on stderr for what is refused, and nothing half written."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SIZES, make_folder

from fastdiff import training
from fastdiff.cli import main
from fastdiff.models.files import sha256
from fastdiff.models.weights import CONFIG, WEIGHTS, fingerprint, load_model


def run(*arguments) -> int:
    """Run one command; argparse's own exit counts as a code too."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as done:
        return int(done.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cli") / "model", two_time=True)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def refused(capsys, code: int, value: str, out=None) -> None:
    """One line on stderr that names the value; nothing on stdout, nothing written."""
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastdiff: ") and value in lines[0], captured.err
    assert captured.out == ""
    assert out is None or not out.exists()


def test_generate_writes_pictures_that_say_how_they_were_made(model, out, capsys):
    assert run("generate", "--model", model, "--class-labels", 2, 0, "--seed", 7, "--out", out) == 0
    assert sorted(file.name for file in out.iterdir()) == ["000007.png", "000008.png"]
    assert "2 images" in capsys.readouterr().out
    with Image.open(out / "000008.png") as picture:
        assert picture.size == (6, 6)
        facts = picture.text
    assert facts["seed"] == "8" and facts["sampler"] == "flow_map" and facts["steps"] == "4"
    assert facts["model"] == fingerprint(model) and facts["software"] == "fastdiff"


def test_generate_draws_every_class_and_prints_one_json_object(model, out, capsys):
    code = run("generate", "--model", model, "--steps", 2, "--sampler", "ddim", "--out", out, "--json")
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert code == 0 and captured.err == "" and captured.out.count("\n") == 1
    assert len(report["files"]) == 3 == len(list(out.iterdir())) and report["seconds"] >= 0


def test_latents_from_a_file_replace_the_noise(model, tmp_path):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).normal(size=(1, 1, 8, 8)))
    for seed in (1, 2):
        options = ["--latents", tmp_path / "noise.npy", "--seed", seed, "--out", tmp_path / str(seed)]
        assert run("generate", "--model", model, "--class-labels", 1, *options) == 0
    first, second = (Image.open(tmp_path / str(seed) / f"00000{seed}.png") for seed in (1, 2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--sampler", "leapfrog"], "'leapfrog'"),
        (["--grid", "trailing_steps"], "'trailing_steps'"),
        (["--steps", "0"], "0"),
        (["--steps", "-3"], "-3"),
        (["--class-labels", "11"], "11"),
        (["--class-labels", "0", "-1"], "-1"),
        (["--num-images-per-prompt", "0"], "0"),
        (["--seed", "-1"], "-1"),
        (["--seed", str(2**63)], str(2**63)),
        (["--guidance-scale", "nan"], "nan"),
        (["--gamma", "2"], "2.0"),
        (["--eta", "0.5"], "'eta'"),
        (["--threads", "0"], "0"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "cifar"], "cifar"),
        (["--latents", "/nowhere/noise.npy"], "/nowhere/noise.npy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_refused_by_name(model, out, capsys, options, value):
    refused(capsys, run("generate", "--model", model, "--out", out, *options), value, out)


def _pickled(file):
    np.save(file, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)


def _archive(file):
    with file.open("wb") as stream:
        np.savez(stream, noise=np.zeros((1, 1, 8, 8)))


def _huge(file):
    """A header that promises 4 PiB."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": (2**50,)}).ljust(117).encode() + b"\n"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


LATENTS = {
    "NaN": lambda file: np.save(file, np.full((1, 1, 8, 8), np.nan)),
    "shape": lambda file: np.save(file, np.zeros((1, 1, 8, 9))),
    "scalar": lambda file: np.save(file, np.zeros(())),
    "strings": lambda file: np.save(file, np.full((1, 1, 8, 8), "x")),
    "complex": lambda file: np.save(file, np.zeros((1, 1, 8, 8), np.complex64)),
    "records": lambda file: np.save(file, np.zeros((1, 1, 8, 8), [("a", "f4"), ("b", "f4")])),
    "pickled": _pickled,
    "huge": _huge,
    "archive": _archive,
    "broken archive": lambda file: file.write_bytes(b"PK\x03\x04 and then nothing"),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("1 2 3\n4 5 6\n"),
    "folder": lambda file: file.mkdir(),
}


@pytest.mark.fast
@pytest.mark.parametrize("kind", LATENTS)
def test_latents_that_are_no_numbers_are_refused(model, out, tmp_path, capsys, kind):
    file = tmp_path / "noise.npy"
    LATENTS[kind](file)
    code = run("generate", "--model", model, "--class-labels", 0, "--latents", file, "--out", out)
    refused(capsys, code, "latents" if kind in ("NaN", "shape", "scalar") else str(file), out)


@pytest.mark.fast
@pytest.mark.parametrize("damage", ["truncated", "folder", "foreign", "missing"])
def test_damaged_weights_are_refused(tmp_path, out, capsys, damage):
    folder = make_folder(tmp_path / "model")
    file = folder / WEIGHTS
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "folder":
        file.mkdir()
    elif damage == "foreign":
        save_file({"lm_head.weight": torch.zeros(2, 2)}, file)
    refused(capsys, run("generate", "--model", folder, "--out", out), str(file), out)
    refused(capsys, run("inspect", folder), str(file))
    refused(capsys, run("export", "--model", folder, "--out", out / "x.onnx"), str(file), out)


@pytest.mark.fast
def test_a_missing_gpu_or_file_in_the_way_is_a_failure_not_wrong_usage(model, tmp_path, capsys):
    if not torch.cuda.is_available():
        assert run("generate", "--model", model, "--device", "cuda") == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "taken").write_text("mine")
    assert run("generate", "--model", model, "--class-labels", 0, "--out", tmp_path / "taken") == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and "taken" in captured.err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate", "--steps", "four"],
        ["generate", "--backend", "jax"],
        ["generate", "--dtype", "float64"],
        ["generate", "--frobnicate"],
        ["train"],
        ["bench", "--backends", "jax"],
    ],
    ids=" ".join,
)
def test_argparse_refuses_with_2(arguments, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error:" in captured.err


@pytest.mark.fast
@pytest.mark.parametrize("command", ["", "generate", "export", "bench", "train", "inspect"])
def test_help_works(command, capsys):
    assert run(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fastdiff {command}".rstrip())
    if command:
        options = set(re.findall(r"--[a-z-]+", text))
        assert "--json" in options and "--threads" in options


@pytest.mark.fast
def test_inspect(model, capsys):
    assert run("inspect", model) == 0
    text = capsys.readouterr().out
    assert fingerprint(model) in text and "mean_velocity" in text
    assert run("inspect", model, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["flow_map"] is True and report["classes"] == ["zero", "one", "two"]
    assert report["input"] == [1, 8, 8] and report["sha256"] == fingerprint(model)
    assert report["parameters"] == sum(p.numel() for p in load_model(model).network.parameters())


@pytest.mark.fast
def test_inspect_shows_the_plan_and_the_cost_of_a_smaller_type(model, capsys):
    assert run("inspect", model, "--json", "--dtype", "bfloat16") == 0
    report = json.loads(capsys.readouterr().out)
    (choices,) = report["cpu"].values()
    assert choices
    errors = report["bfloat16"]["relative_error"]
    assert errors["float32"] < 1e-5 < errors["bfloat16"] < 0.1
    assert run("inspect", model) == 0
    assert "on this CPU" in capsys.readouterr().out


@pytest.mark.fast
def test_generate_says_what_small_cards_need(model, capsys):
    refused(capsys, run("generate", "--model", model, "--cpu-offload"), "give --device cuda with it")
    refused(capsys, run("generate", "--model", model, "--vae-tiling"), "--vae-tiling is for text-to-image models")


def test_inspect_shows_the_cost_of_step_caching(model, capsys):
    told = ["--json", "--cache-interval", "1", "2", "--cache-branch-id", "0", "3", "--steps", "4"]
    assert run("inspect", model, *told) == 0
    found = json.loads(capsys.readouterr().out)["step_caching"]
    assert [(entry["cache_interval"], entry["cache_branch_id"]) for entry in found] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    assert all(entry["relative_error"] == 0 for entry in found[:2])
    assert all(0 < entry["relative_error"] < 1 and entry["time_over_none"] > 0 for entry in found[2:])
    refused(capsys, run("inspect", model, "--cache-interval", "2", "--cache-branch-id", "99"), "cache_branch_id is 99")
    assert run("generate", "--model", model, "--steps", "4", "--cache-interval", "0", "--class-labels", "3") == 2


def test_inspect_refuses_an_onnx_file_without_its_manifest(tmp_path, capsys):
    (tmp_path / "x.onnx").write_bytes(b"anything")
    refused(capsys, run("inspect", tmp_path / "x.onnx"), "x.onnx.json")
    refused(capsys, run("inspect", tmp_path / "y.onnx"), "y.onnx")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("command", "options", "value"),
    [
        ("export", ["--fuse-sampler", "0"], "0"),
        ("export", ["--fuse-sampler", "2", "--sampler", "leapfrog"], "'leapfrog'"),
        ("export", ["--fuse-sampler", "1001"], "1001"),
        ("export", ["--sampler", "ddim"], "--fuse-sampler"),
    ],
)
def test_export_refuses(model, out, capsys, command, options, value):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    refused(capsys, run(command, "--model", model, "--out", out / "x.onnx", *options), value, out)


# --- train ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """The arguments of a tiny training run: 24 random pictures of 3 classes, 6 x 6 padded to 8 x 8."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=np.arange(24, dtype=np.uint8) % 3)
    (tmp_path / CONFIG).write_text(json.dumps({"_class_name": "UNet2DModel", **SIZES, "num_class_embeds": 4}))
    return [
        "train", "--data", tmp_path / "data.npz", "--config", tmp_path / CONFIG, "--iterations", 4,
        "--batch-size", 8, "--holdout", 4, "--loss", "lsd", "--distil-from", 1,
    ]  # fmt: skip


def test_training_interrupted_and_resumed_equals_unbroken(trained, tmp_path, capsys, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*trained, "--out", whole, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"model": str(whole), "iteration": 4, "resumed": False}
    assert captured.err == ""

    step = training.Trainer.step

    def interrupted(self):
        if self.iteration == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", interrupted)
        patch.setattr(training.Trainer, "run", functools.partialmethod(training.Trainer.run, save_every=2))
        assert run(*trained, "--out", broken) == 1
        assert capsys.readouterr().err == "fastdiff: interrupted\n"
    assert int(load_file(broken / training.CHECKPOINT)["iteration"]) == 2
    assert run(*trained, "--out", broken, "--json") == 0
    assert json.loads(capsys.readouterr().out)["resumed"] is True

    for name in (training.CHECKPOINT, WEIGHTS, "target_embedding.safetensors"):
        first, second = load_file(whole / name), load_file(broken / name)
        assert sorted(first) == sorted(second) and all(torch.equal(first[key], second[key]) for key in first)
    info = load_model(whole).info
    assert info.prediction == "mean_velocity" and info.null_label == 3 and info.crop == 1 and len(info.classes) == 3
    assert run("generate", "--model", whole, "--class-labels", 1, "--out", tmp_path / "pictures") == 0
    with Image.open(tmp_path / "pictures" / "000000.png") as picture:
        assert picture.size == (6, 6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--loss", "hinge"], "'hinge'"),
        (["--path", "curved"], "'curved'"),
        (["--path", "edm"], "'edm'"),
        (["--iterations", "0"], "0"),
        (["--batch-size", "0"], "0"),
        (["--batch-size", "3"], "3"),
        (["--holdout", "24"], "24"),
        (["--holdout", "-1"], "-1"),
        (["--learning-rate", "nan"], "nan"),
        (["--learning-rate", "-1"], "-1.0"),
        (["--ema", "1.5"], "1.5"),
        (["--data", "/nowhere/x.npz"], "/nowhere/x.npz"),
        (["--config", "/nowhere/c.json"], "/nowhere/c.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_by_name(trained, out, capsys, options, value):
    refused(capsys, run(*trained, "--out", out, *options), value, out)


IMAGES, LABELS = np.zeros((24, 6, 6), np.uint8), np.arange(24) % 3
DATA = {
    "no labels": {"train_images": IMAGES},
    "float images": {"train_images": IMAGES.astype(np.float32), "train_labels": LABELS},
    "too large": {"train_images": np.zeros((24, 10, 10), np.uint8), "train_labels": LABELS},
    "odd padding": {"train_images": np.zeros((24, 7, 7), np.uint8), "train_labels": LABELS},
    "three channels": {"train_images": np.zeros((24, 6, 6, 3), np.uint8), "train_labels": LABELS},
    "few labels": {"train_images": IMAGES, "train_labels": LABELS[:20]},
    "label strings": {"train_images": IMAGES, "train_labels": np.full(24, "cat")},
    "negative labels": {"train_images": IMAGES, "train_labels": LABELS - 1},
    "float labels": {"train_images": IMAGES, "train_labels": LABELS + 0.5},
    "no images": {"train_images": IMAGES[:0], "train_labels": LABELS[:0]},
}


@pytest.mark.fast
@pytest.mark.parametrize("kind", [*DATA, "array", "broken", "pickled"])
def test_train_refuses_data_that_is_not_as_described(trained, tmp_path, out, capsys, kind):
    file = tmp_path / "data.npz"
    if kind in DATA:
        np.savez(file, **DATA[kind])
    elif kind == "array":
        with file.open("wb") as stream:
            np.save(stream, IMAGES)
    elif kind == "broken":
        file.write_bytes(file.read_bytes()[:400])
    else:
        np.savez(file, train_images=np.array([{}], dtype=object), train_labels=LABELS, allow_pickle=True)
    value = "these images have 3" if kind == "three channels" else str(file)
    refused(capsys, run(*trained, "--out", out), value, out)


@pytest.mark.fast
@pytest.mark.parametrize("damage", ["truncated", "other sizes", "other loss"])
def test_train_refuses_a_checkpoint_of_another_run(trained, out, capsys, damage):
    trained[trained.index("--iterations") + 1] = 1
    assert run(*trained, "--out", out) == 0
    capsys.readouterr()
    file = out / training.CHECKPOINT
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "other sizes":
        save_file({"iteration": torch.tensor(1), "network.x": torch.zeros(1)}, file)
    before = sha256(file)
    options = ["--loss", "velocity"] if damage == "other loss" else []
    refused(capsys, run(*trained, "--out", out, *options), str(file))
    assert sha256(file) == before


@pytest.mark.fast
def test_a_half_written_log_line_does_not_stop_a_resume(trained, out):
    trained[trained.index("--iterations") + 1] = 1
    assert run(*trained, "--out", out) == 0
    with (out / training.LOG).open("a") as log:
        log.write('{"iteration": 2, "sec')
    assert run(*trained, "--out", out) == 0
    assert [json.loads(line)["iteration"] for line in (out / training.LOG).read_text().splitlines()] == [1]
