"""Built folders of text-to-image models with engines: one of every network for every GPU named."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxruntime", reason="build needs onnxruntime (pip install 'fastdiff[onnx]')")
pytest.importorskip("transformers", reason="text encoders need transformers (pip install 'fastdiff[text]')")
pytest.importorskip("diffusers", reason="tiny models are made by diffusers (pip install 'fastdiff[test]')")
pytest.importorskip("tensorrt_rtx", reason="builds need TensorRT for RTX (pip install 'fastdiff[tensorrt-rtx]')")
from pathlib import Path  # noqa: E402

import tiny_pipelines as tiny  # noqa: E402

from fastdiff import Pipeline  # noqa: E402
from fastdiff.backends import trt  # noqa: E402
from fastdiff.backends.ort_session import Runner, open_session  # noqa: E402
from fastdiff.backends.plan_files import load_manifest  # noqa: E402
from fastdiff.built import BUILT, read_folder  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.models.files import sha256  # noqa: E402


@pytest.fixture(scope="module", params=["sd", "xl"])
def with_engines(request, tmp_path_factory):
    """A folder with engines of TensorRT for RTX for two sizes, by the command; and the hash that it tells."""
    root = tmp_path_factory.mktemp("engines")
    model = root / "model"
    (tiny.stable_diffusion if request.param == "sd" else tiny.stable_diffusion_xl)(root).save_pretrained(model)
    (root / "user").mkdir(mode=0o700)
    command = ["build", "--model", str(model), "--out", str(root / "out"), "--steps", "2", "3", "--sampler", "dpmpp_2m"]
    sizes = ["--bucket", "height=8:8:12", "width=8:8:8", "--bucket", "height=16:16:16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(root / "user"))
        assert main([*command, "--engine", "sm86", "sm89", "--batch", "1", "1", "2", *sizes]) == 0
    return root / "out", sha256(root / "out" / BUILT)


def test_every_network_has_an_engine_for_every_gpu(with_engines):
    folder = read_folder(with_engines[0])
    names = ["decoder", *(Path(words.graph).stem for words in folder.text.encoders), "unet", "unet.prepare"]
    for here in ("sm86", "sm89"):
        plans = [name for name in folder.files if name.startswith(here) and name.endswith(".plan")]
        assert sorted(plans) == [f"{here}/{name}.plan" for name in names]
        assert all(preset.plans[here] == f"{here}/unet.plan" for preset in folder.presets.values())
        assert all(load_manifest(folder.file(plan)).architectures == (here,) for plan in plans)
    first, second = load_manifest(folder.file("sm89/unet.plan")).profiles
    # guidance asks for both estimates at once, so twice the batch
    assert [shape[0] for shape in first["sample"]] == [1, 2, 4] and first["sample"][2][2:] == [12, 8]
    assert second["sample"][0] == [1, 4, 16, 8]
    (only,) = load_manifest(folder.file("sm89/text_encoder_1.plan")).profiles
    assert [shape[0] for shape in only["input_ids"]] == [1, 1, 2]


def test_pictures_by_engines_are_those_of_the_graphs(with_engines, monkeypatch):
    """A stand-in runs the graph of the same name wherever an engine is opened, within the profiles of that engine."""
    (root, digest), seen = with_engines, []

    def engine(file, device, trusted=(), library=None):
        assert sha256(file.with_name(f"{file.name}.json")) in trusted
        run, told = Runner(open_session(root / f"{file.stem}.onnx", device), device), load_manifest(file)

        class Engine:
            inputs, outputs, manifest = run.inputs, run.outputs, told

            def __call__(self, given):
                shapes = {name: list(given[name].shape) for name in self.inputs}
                fits = [all(all(a <= n <= c for a, n, c in zip(lo, shapes[name], hi, strict=True))
                            for name, (lo, _, hi) in profile.items()) for profile in told.profiles]  # fmt: skip
                assert any(fits), (file.name, shapes, told.profiles)
                seen.append(file.stem)
                return run(given)

        return Engine()

    monkeypatch.setattr(trt, "architecture_of", lambda device: "sm89")
    monkeypatch.setattr(trt, "load_engine", engine)
    asked = {"seed": 3, "output_type": "pt", "negative_prompt": "fog"}
    ours = Pipeline.from_built(root, backend="tensorrt", trust=digest)
    theirs = Pipeline.from_built(root)
    for more in (
        {"prompt": ["a cat", "two dogs, red"]},
        {"prompt": "a cat", "height": 32},
        {"prompt": "a", "preset": "dpmpp_2m-3"},
    ):
        assert torch.equal(ours(**asked | more).images, theirs(**asked | more).images)
    assert {"decoder", "text_encoder_1", "unet", "unet.prepare"} <= set(seen)


def test_engines_for_sizes_that_are_none_are_refused(with_engines, tmp_path, capsys):
    command = [
        "build",
        "--model",
        str(with_engines[0].parent / "model"),
        "--out",
        str(tmp_path / "out"),
        "--engine",
        "sm89",
    ]
    assert main([*command, "--cache", str(tmp_path / "plans"), "--bucket", "batch=1:1:1"]) == 2
    assert "a bucket bounds dimension 'batch'; of a text-to-image model's engines: height" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
