"""What the TensorRT runtime is told, asked of a library that runs on the CPU: nothing here shows that a GPU obeys."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import make_folder

from fastdiff import Pipeline
from fastdiff.backends.ort import WholeNetwork
from fastdiff.backends.plan_files import PlanManifest, joined, read_sealed, save_manifest
from fastdiff.backends.trt import Engine, check_pair
from fastdiff.backends.trt_library import Library
from fastdiff.backends.trt_refit import refit_from_graph, refit_weights
from fastdiff.errors import ArtifactError, BackendError, ShapeError
from fastdiff.models.weights import fingerprint
from fastdiff.sampling import Cond, sample

pytestmark = pytest.mark.fast
PROFILES = (
    {"x": [[1, 2], [2, 2], [4, 2]], "k": [[1], [2], [4]]},
    {"x": [[5, 2], [8, 2], [16, 2]], "k": [[5], [8], [16]]},
)
MANIFEST = PlanManifest(
    "0" * 64, 1, "key", "tensorrt_rtx", "1.7", ("sm86",), "graph",
    inputs={"x": ["HALF", [-1, 2]], "k": ["INT64", [-1]]}, outputs={"y": ["FLOAT", [-1, 2]]},
    profiles=PROFILES, refit=True,
)  # fmt: skip


class FakeContext:
    """Computes ``y = x * k`` at the addresses it was given, as float16 and int64 in, float32 out."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.profile = engine, {}, {}, None
        engine.contexts.append(self)

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile, stream
        return True

    def set_input_shape(self, name, shape):
        low, _, high = PROFILES[self.profile[0]][name]
        assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self.shapes[name] = shape

    def get_tensor_shape(self, name):
        assert name == "y"
        return self.shapes["x"]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def at(self, name, kind):
        shape = self.shapes["x" if name == "y" else name]
        buffer = (ctypes.c_char * (int(np.prod(shape)) * np.dtype(kind).itemsize)).from_address(self.addresses[name])
        return np.frombuffer(buffer, kind).reshape(shape)

    def execute_async_v3(self, stream):
        assert stream == self.profile[1]
        if self.engine.refuses:
            return False
        result = self.at("x", np.float16).astype(np.float32) * self.at("k", np.int64)[:, None] * self.engine.weight
        self.at("y", np.float32)[:] = result
        return True


class FakeEngine:
    def __init__(self):
        self.contexts, self.refuses, self.weight, self.config = [], False, 1.0, SimpleNamespace()
        self.cache = SimpleNamespace(known=None, serialize=lambda: b"compiled", deserialize=self.take)
        self.config.create_runtime_cache = lambda: self.cache
        self.config.set_runtime_cache = lambda cache: setattr(self.config, "cache", cache)

    def take(self, blob):
        self.cache.known = blob

    def create_runtime_config(self):
        return self.config

    def create_execution_context(self, config):
        assert config is self.config and config.cache is self.cache
        return FakeContext(self)


class FakeRefitter:
    def __init__(self, engine, logger):
        self.engine, self.pending, self.missing = engine, {}, []

    def get_all_weights(self):
        return ["weight"]

    def get_weights_prototype(self, name):
        return SimpleNamespace(size=1, dtype=SimpleNamespace(name="FLOAT"))

    def set_named_weights(self, name, weights, where):
        kind, address, count = weights
        self.pending[name] = ctypes.c_float.from_address(address).value
        return True

    def get_missing_weights(self):
        return self.missing

    def refit_cuda_engine(self):
        self.engine.weight = self.pending["weight"]
        return True


LOGGER = SimpleNamespace(said=lambda: "out of memory")
MODULE = SimpleNamespace(
    Refitter=FakeRefitter, TensorLocation=SimpleNamespace(DEVICE=0, HOST=1), Weights=lambda *given: given
)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))
    return make(tmp_path)


def make(folder, stream=lambda: 7):
    library = Library("tensorrt_rtx", MODULE)
    return Engine(library, FakeEngine(), MANIFEST, torch.device("cpu"), LOGGER, stream, folder / "kernels")


def inputs(batch):
    return {"x": torch.arange(2.0 * batch).view(batch, 2), "k": torch.arange(batch)}


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 16])
def test_tensors_are_bound_where_they_lie(engine, batch):
    given = inputs(batch)
    (y,) = engine(given | {"z": torch.zeros(1)}).values()  # what the engine does not know is left out
    assert torch.equal(y, given["x"] * given["k"][:, None]) and y.dtype == torch.float32


def test_a_type_or_layout_the_engine_lacks_is_converted_on_the_device(engine):
    x = torch.arange(8, dtype=torch.float64).view(2, 4).t()  # neither half nor contiguous
    (y,) = engine({"x": x, "k": torch.ones(4, dtype=torch.int32)}).values()
    assert torch.equal(y, x.float())


def test_each_profile_and_stream_has_its_context(tmp_path, engine):
    streams = iter([1, 1, 1, 2])
    engine = make(tmp_path, lambda: next(streams))
    for batch in (2, 3, 8, 2):
        engine(inputs(batch))
    assert [context.profile for context in engine.engine.contexts] == [(0, 1), (1, 1), (0, 2)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (inputs(17), r"this engine was built for x \[1, 2\] to \[4, 2\].*; or x \[5, 2\] to \[16, 2\]"),
        ({"x": torch.zeros(2, 3), "k": torch.zeros(2)}, "inputs are {'x': \\(2, 3\\)"),
        ({"x": torch.zeros(2, 2)}, "input 'k' is missing; needed: x, k"),
        ({"x": torch.zeros(2, 2, device="meta"), "k": torch.zeros(2)}, "input 'x' lies on meta; needed: cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_named(engine, given, says):
    with pytest.raises(ShapeError, match=says):
        engine(given)


def test_a_refusal_is_passed_on(engine):
    engine.engine.refuses = True
    with pytest.raises(BackendError, match="TensorRT for RTX did not run: out of memory"):
        engine(inputs(2))


def test_threads_do_not_mix_their_tensors(engine):
    wrong = []

    def run(number):
        for _ in range(50):
            given = {"x": torch.full((2, 2), float(number)), "k": torch.tensor([1, 2])}
            if not torch.equal(engine(given)["y"], given["x"] * given["k"][:, None]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(engine.engine.contexts) == 1


def test_what_was_compiled_is_kept_for_the_next_process(tmp_path, engine):
    engine(inputs(2))
    assert read_sealed(tmp_path / "kernels") == b"compiled"
    assert make(tmp_path).engine.cache.known == b"compiled"
    (tmp_path / "kernels").write_bytes(b"X" * 80)
    assert make(tmp_path).engine.cache.known is None


def test_weights_can_be_swapped(engine):
    refit_weights(engine, {"weight": torch.tensor([3.0], dtype=torch.float64)})
    given = inputs(2)
    assert torch.equal(engine(given)["y"], 3 * given["x"] * given["k"][:, None])
    with pytest.raises(ArtifactError, match="has no weight 'bias' that can be changed"):
        refit_weights(engine, {"bias": torch.zeros(1)})
    with pytest.raises(ShapeError, match="weight 'weight' has 2 numbers; the engine's has 1"):
        refit_weights(engine, {"weight": torch.zeros(2)})


def test_weights_that_go_together_are_swapped_together(engine, monkeypatch):
    monkeypatch.setattr(FakeRefitter, "get_missing_weights", lambda self: ["scale"])
    with pytest.raises(BackendError, match="must change together; missing: scale"):
        refit_weights(engine, {"weight": torch.zeros(1)})
    assert engine.engine.weight == 1.0


def test_an_engine_with_fixed_weights_is_not_refitted(engine, tmp_path):
    engine.manifest = replace(MANIFEST, refit=False)
    with pytest.raises(ArtifactError, match="was built without refit"):
        refit_weights(engine, {})
    with pytest.raises(ArtifactError, match="no such file"):
        refit_from_graph(engine, tmp_path / "missing.onnx")


def test_an_engine_of_something_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))
    folder = make_folder(tmp_path / "model", classes=False)
    with pytest.raises(ArtifactError, match="unet.plan: no such file; fastdiff build --engine makes"):
        Pipeline.from_pretrained(folder, backend="tensorrt")
    file = tmp_path / "x.plan"
    file.write_bytes(b"p")
    for graph, says in (
        ({"kind": "sampler"}, "holds a sampler; the engine of a 'unet' export is needed"),
        ({"kind": "unet", "model_sha256": "0"}, "was made from other weights"),
        ({"kind": "step", "model_sha256": "0"}, "was made from other weights"),
        (
            {"kind": "unet", "model_sha256": fingerprint(folder)},
            "1.7|not those",
        ),
    ):
        save_manifest(file, replace(MANIFEST, graph=graph))
        with pytest.raises((ArtifactError, BackendError), match=says):
            Pipeline.from_pretrained(folder, backend="tensorrt", artifact=file)


def test_two_engines_of_one_export_belong_together(tmp_path):
    step = replace(MANIFEST, graph={"files": {"unet.prepare.onnx": "a" * 64, "unet.onnx.data": "b" * 64}})
    file = tmp_path / "unet.prepare.plan"
    check_pair(file, replace(MANIFEST, graph_sha256="a" * 64), step)
    for wrong, of in ((replace(MANIFEST, graph_sha256="c" * 64), step), (MANIFEST, replace(step, graph={}))):
        with pytest.raises(ArtifactError, match="belongs to another export than the engine beside it"):
            check_pair(file, wrong, of)
    files = step.graph["files"] | {"unet.prepare.onnx.data": "d" * 64}
    both = replace(MANIFEST, graph_sha256=joined(["a" * 64, "d" * 64]))
    check_pair(file, both, replace(step, graph={"files": files}))


def test_the_loop_asks_whatever_runs_like_an_engine():
    told = []

    class Known:
        inputs = {"sample": None, "timestep": None, "class_labels": None}

        def __call__(self, given):
            told.append(given["timestep"].tolist())
            return {"output": given["sample"] * given["timestep"][:, None, None, None]}

    how = {"num_inference_steps": 3, "sampler": "ddim", "seed": 0, "cond": Cond(torch.tensor([4, 5]))}
    wanted = sample(lambda x, t, class_labels: x * t[:, None, None, None], (2, 1, 4, 4), **how)
    assert torch.equal(sample(WholeNetwork(Known()), (2, 1, 4, 4), **how), wanted) and len(told) == 3


def test_text_to_image_takes_an_engine_too(tmp_path):
    pytest.importorskip("diffusers", reason="makes the folder with diffusers (pip install 'fastdiff[bench]')")
    import tiny_pipelines as tiny

    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    with pytest.raises(ArtifactError, match="unet.unet.plan: no such file; fastdiff build --engine makes"):
        Pipeline.from_pretrained(tmp_path / "model", backend="tensorrt")
    with pytest.raises(ArtifactError, match="belongs to backend 'onnxruntime' or 'tensorrt', not to 'eager'"):
        Pipeline.from_pretrained(tmp_path / "model", backend="eager", artifact="x.plan")
