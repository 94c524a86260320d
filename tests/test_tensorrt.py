"""Engines: built on a machine without a GPU by TensorRT for RTX, kept in a cache that survives being killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import onnx
import pytest

pytest.importorskip("tensorrt_rtx", reason="builds need TensorRT for RTX (pip install 'fastdiff[tensorrt-rtx]')")

from fastdiff.backends import plan_files  # noqa: E402
from fastdiff.backends.plan_files import manifest_of, read_plan  # noqa: E402
from fastdiff.backends.trt_library import find_library  # noqa: E402
from fastdiff.benchmarks.tiny_graph import CHANNELS, tiny_graph  # noqa: E402
from fastdiff.errors import ArtifactError, BackendError, PlanError  # noqa: E402
from fastdiff.export import tensorrt  # noqa: E402
from fastdiff.export.plan_cache import PLAN, PlanCache  # noqa: E402
from fastdiff.export.tensorrt import BuildCancelled, Built, Recipe, build_plan, parse  # noqa: E402

BUCKET = {"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 8, 16)}
RECIPE = Recipe((BUCKET,), ("sm86",))
TYPES = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16}
LIBRARY = find_library("tensorrt_rtx")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))


@pytest.fixture
def graph(tmp_path):
    return tiny_graph(tmp_path / "tiny.onnx")


class Counting:
    """A builder that is not asked twice for the same thing."""

    def __init__(self, timings: bytes | None = None):
        self.asked, self.timings = [], timings

    def __call__(self, library, file, recipe, **how):
        self.asked.append((file.name, recipe, how["timings"]))
        return Built(os.urandom(64), {}, {}, (), {}, self.timings)


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans", LIBRARY, Counting())


@pytest.mark.parametrize("architecture", ["sm86", "sm89", "sm120"])
@pytest.mark.parametrize("precision", TYPES)
def test_a_graph_builds_in_its_own_precision(tmp_path, precision, architecture):
    built = build_plan(LIBRARY, tiny_graph(tmp_path / "x.onnx", TYPES[precision]), Recipe((BUCKET,), (architecture,)))
    assert len(built.plan) > 10_000
    assert built.inputs == {"x": [precision, [-1, 1, -1, -1]]}
    assert built.outputs == {"y": [precision, [-1, CHANNELS, -1, -1]]}
    assert built.layers[f"CONVOLUTION {precision}"] == 1 == built.layers[f"NORMALIZATION {precision}"]
    assert {name.split()[1] for name in built.layers} <= {precision, "INT32", "INT64"}  # nothing else computes
    assert built.profiles == ({"x": ((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 16, 16))},)


def test_one_plan_for_several_gpus_and_buckets(graph):
    large = {"batch": (1, 1, 2), "height": (32, 64, 64), "width": (32, 64, 64)}
    built = build_plan(LIBRARY, graph, Recipe((BUCKET, large), ("sm86", "sm89", "sm120")))
    assert [shapes["x"][2] for shapes in built.profiles] == [(4, 1, 16, 16), (2, 1, 64, 64)]


@pytest.mark.filterwarnings("ignore:.*[Tt]iming cache:DeprecationWarning")
def test_what_tensorrt_is_told_is_part_of_the_same_interface(graph):
    """TensorRT itself is not here; its twin takes the calls that only TensorRT needs, and does nothing about them."""
    twin = LIBRARY._replace(name="tensorrt")
    recipe = Recipe((BUCKET,), optimization_level=1, workspace_bytes=1 << 28)
    first = build_plan(twin, graph, recipe)
    assert first.timings and build_plan(twin, graph, recipe, timings=first.timings).plan
    with pytest.raises(PlanError, match="TensorRT builds for the GPU that is here: name none"):
        build_plan(twin, graph, RECIPE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ("sm90",)}, "architectures are sm90; allowed, for TensorRT for RTX: sm75, "),
        ({"architectures": ()}, "architectures are not given"),
        ({"buckets": ()}, "one bucket of shapes or more"),
        ({"buckets": ({"batch": (1, 2, 4)},)}, "a bucket does not bound dimension 'height'; .*: batch, height, width"),
        ({"buckets": (BUCKET | {"depth": (1, 1, 1)},)}, "a bucket bounds dimension 'depth'"),
        ({"buckets": (BUCKET | {"width": (8, 4, 16)},)}, r"dimension 'width' is \[8, 4, 16\]"),
        ({"optimization_level": 6}, "optimization_level is 6; allowed: 0 to 5"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(graph, change, says):
    with pytest.raises(PlanError, match=says):
        build_plan(LIBRARY, graph, RECIPE._replace(**change))


def test_what_the_library_cannot_read_is_named(tmp_path):
    model = onnx.load(tiny_graph(tmp_path / "x.onnx"))
    model.graph.node[2].op_type = "Nonsense"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="x.onnx: TensorRT for RTX cannot read it: .*Nonsense"):
        build_plan(LIBRARY, tmp_path / "x.onnx", RECIPE)


def test_refit_without_a_driver_says_so(graph):
    import torch

    if torch.cuda.is_available():
        assert build_plan(LIBRARY, graph, RECIPE._replace(refit=True)).plan
    else:
        with pytest.raises(BackendError, match="links refittable engines with the CUDA driver, and there is none"):
            build_plan(LIBRARY, graph, RECIPE._replace(refit=True))


def test_the_graph_names_every_weight_that_a_refit_may_change(graph):
    network = parse(LIBRARY, graph).network
    for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
        assert network.mark_weights_refittable(name), name


def test_a_build_can_be_cancelled_and_interrupted(graph):
    asked = []
    with pytest.raises(BuildCancelled, match="was cancelled"):
        build_plan(LIBRARY, graph, RECIPE, cancelled=lambda: asked.append(1) or len(asked) == 3)
    assert len(asked) == 3

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(LIBRARY, graph, RECIPE, cancelled=interrupt)


def test_ctrl_c_stops_a_build(tmp_path):
    """At any moment: signals come to the main thread, whatever the library does in another."""
    program = (
        "import sys, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # who starts the tests may ignore it
        "from fastdiff.backends.trt_library import find_library\n"
        "from fastdiff.export import tensorrt\n"
        "told = lambda: [print('building', flush=True), time.sleep(0.02)][1]\n"  # so that it is not over before
        "recipe = tensorrt.Recipe(({'batch': (1, 1, 1), 'height': (8, 8, 8), 'width': (8, 8, 8)},), ('sm86',))\n"
        "tensorrt.build_plan(find_library('tensorrt_rtx'), pathlib.Path(sys.argv[1]), recipe, cancelled=told)\n"
    )
    file = tiny_graph(tmp_path / "x.onnx")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt") and process.returncode != 0


def test_a_build_shows_how_far_it_is(graph, capsys):
    build_plan(LIBRARY, graph, RECIPE, bars=True)
    assert "Building engine" in capsys.readouterr().err


def test_nothing_is_built_twice(cache, graph):
    first = cache.get(graph, RECIPE)
    assert cache.get(graph, RECIPE) == first and len(cache.builder.asked) == 1
    plan, manifest = cache.read(first)
    assert plan == first.read_bytes() and manifest.key == first.parent.name and manifest.architectures == ("sm86",)
    assert cache.entries() == [first]


def test_whatever_decides_the_result_is_in_the_key(cache, graph, tmp_path, monkeypatch):
    keys = [cache.key(graph, RECIPE)]
    keys += [cache.key(graph, RECIPE._replace(**change)) for change in (
        {"architectures": ("sm89",)}, {"refit": True}, {"optimization_level": 1}, {"workspace_bytes": 1 << 20},
        {"buckets": (BUCKET | {"batch": (1, 2, 8)},)},
    )]  # fmt: skip
    keys.append(cache.key(tiny_graph(tmp_path / "weights.onnx", seed=1), RECIPE))
    keys.append(cache.key(tiny_graph(tmp_path / "half.onnx", np.float16), RECIPE))
    monkeypatch.setattr(LIBRARY.module, "__version__", "0.0.1")
    keys.append(cache.key(graph, RECIPE))
    monkeypatch.undo()
    monkeypatch.setattr(tensorrt, "__file__", str(tmp_path / "half.onnx"))  # other code
    keys.append(cache.key(graph, RECIPE))
    assert len(set(keys)) == len(keys)


def test_the_key_knows_weights_beside_the_graph(cache, graph, tmp_path):
    model = onnx.load(graph)
    outside = tmp_path / "outside"
    outside.mkdir()
    onnx.save(model, outside / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    before = cache.key(outside / "x.onnx", RECIPE)
    content = bytearray((outside / "x.data").read_bytes())
    content[7] ^= 1
    (outside / "x.data").write_bytes(content)
    assert cache.key(outside / "x.onnx", RECIPE) != before
    (outside / "x.data").unlink()
    with pytest.raises(ArtifactError, match="x.data: no such file"):
        cache.key(outside / "x.onnx", RECIPE)


def test_a_graph_whose_weights_lie_elsewhere_is_refused(cache, graph, tmp_path):
    model = onnx.load(graph)
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    model = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    for name in ("/etc/passwd", "../x.data"):
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = name
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "x.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match="allowed: a file beside it"):
            cache.get(tmp_path / "bad" / "x.onnx", RECIPE)


@pytest.mark.parametrize("damage", ["plan", "manifest", "gone", "stale", "moved"])
def test_a_damaged_entry_is_built_again(cache, graph, damage):
    file = cache.get(graph, RECIPE)
    if damage == "plan":
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    elif damage == "manifest":
        manifest_of(file).write_text("{")
    elif damage == "gone":
        manifest_of(file).unlink()
    elif damage == "stale":
        values = json.loads(manifest_of(file).read_text())
        manifest_of(file).write_text(json.dumps(values | {"version": "0.0.1"}))
    else:  # a whole entry, but of another graph
        other = cache.get(graph, RECIPE._replace(refit=True))
        shutil.rmtree(file.parent)
        shutil.copytree(other.parent, file.parent)
    asked = len(cache.builder.asked)
    assert cache.get(graph, RECIPE) == file and len(cache.builder.asked) == asked + 1
    assert cache.read(file)[1].key == file.parent.name


def test_a_failed_build_leaves_the_cache_as_it_was(tmp_path, graph):
    def fail(*_, **__):
        raise ArtifactError("it failed")

    cache = PlanCache(tmp_path / "plans", LIBRARY, fail)
    with pytest.raises(ArtifactError, match="it failed"):
        cache.get(graph, RECIPE)
    assert [name for name in os.listdir(cache.folder) if not name.endswith(".lock")] == []


def test_timings_are_kept_for_the_next_build_unless_changed(tmp_path, graph):
    builder = Counting(timings=b"measured")
    cache = PlanCache(tmp_path / "plans", LIBRARY, builder)
    cache.get(graph, RECIPE)
    cache.get(graph, RECIPE._replace(optimization_level=1))
    (file,) = cache.folder.glob("timings-*")
    file.write_bytes(file.read_bytes()[:-1] + b"X")
    cache.get(graph, RECIPE._replace(optimization_level=2))
    assert [timings for _, _, timings in builder.asked] == [None, b"measured", None]


def _build_slowly(folder, graph, log):
    def builder(*_, **__):
        with open(log, "a") as out:
            out.write("built\n")
        time.sleep(0.3)
        return Built(b"plan", {}, {}, (), {}, None)

    PlanCache(folder, LIBRARY, builder).get(graph, RECIPE)


def test_processes_that_want_the_same_engine_build_it_once(tmp_path, graph):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "plans", graph, tmp_path / "log")
    both = [context.Process(target=_build_slowly, args=arguments) for _ in range(3)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"


def _die_half_way(folder, graph):
    def save(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    plan_files.write_text = save  # the plan is written, its manifest is not
    PlanCache(folder, LIBRARY, Counting()).get(graph, RECIPE)


def test_a_killed_build_is_cleared_away(cache, graph):
    process = multiprocessing.get_context("fork").Process(target=_die_half_way, args=(cache.folder, graph))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(cache.folder.glob(".*.part")) and cache.entries() == []
    file = cache.get(graph, RECIPE)
    assert cache.read(file) and file.name == PLAN and not list(cache.folder.glob(".*.part"))


def test_a_real_engine_comes_out_of_the_cache_as_it_went_in(tmp_path, graph):
    cache = PlanCache(tmp_path / "plans", LIBRARY)
    file = cache.get(graph, RECIPE)
    plan, manifest = read_plan(file, library=LIBRARY.name, version=LIBRARY.version)
    assert manifest.layers["CONVOLUTION FLOAT"] == 1 and manifest.bytes == len(plan)
    assert manifest.profiles == ({"x": [[1, 1, 8, 8], [2, 1, 8, 8], [4, 1, 16, 16]]},)
