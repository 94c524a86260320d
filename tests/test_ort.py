"""The onnxruntime backend: text models behind the same loop, files that lead elsewhere, providers that do not load."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="export needs onnx (pip install 'fastdiff[onnx]')")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install 'fastdiff[onnx]')")

from small import make_folder, make_model  # noqa: E402

from fastdiff import Pipeline  # noqa: E402
from fastdiff.artifact import load_manifest, save_manifest  # noqa: E402
from fastdiff.backends.onnx_files import check_external_data  # noqa: E402
from fastdiff.backends.ort import FILE  # noqa: E402
from fastdiff.backends.ort_session import Runner, open_session  # noqa: E402
from fastdiff.errors import ArtifactError, BackendError, PlanError, ShapeError  # noqa: E402
from fastdiff.export.onnx import export_unet  # noqa: E402
from fastdiff.export.publish import Options  # noqa: E402
from fastdiff.models.weights import Model, ModelInfo, load_model, load_unet  # noqa: E402

CLOSE = 1e-4  # of pictures in [0, 1]: two libraries, several steps
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A graph with its weights in a file of their own."""
    file = tmp_path_factory.mktemp("apart") / "unet.onnx"
    export_unet(make_model(), file, options=Options(external_data=True, parity=False))
    return file


def moved(source: Path, folder: Path, location: str) -> Path:
    """The same graph, whose first large weight lies elsewhere."""
    model = onnx.load(source, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        entry.value = location if entry.key == "location" else entry.value
    file = folder / "moved.onnx"
    file.write_bytes(model.SerializeToString())
    for name in {location, f"{source.name}.data"}:
        if "/" not in name and not (folder / name).exists():
            (folder / name).write_bytes(source.with_name(f"{source.name}.data").read_bytes())
    return file


# --- files ------------------------------------------------------------------------------------------------------------


def test_weights_beside_the_graph_are_let_through(apart, tmp_path):
    assert check_external_data(apart) == [apart.with_name("unet.onnx.data")]
    session = open_session(moved(apart, tmp_path, "other.data"), CPU)
    assert [entry.name for entry in session.get_outputs()] == ["output"]


@pytest.mark.parametrize(
    "location",
    [
        "../unet.onnx.data",
        "/etc/passwd",
        "a/../../x",
        "sub/x",
        "..",
        ".",
        "",
        "a\\b",
        "C:x",
        "*/_ORT_MEM_ADDR_/*",
        "a\nb",
    ],
)
def test_weights_that_lie_elsewhere_are_refused(apart, tmp_path, location):
    file = moved(apart, tmp_path, location)
    with pytest.raises(ArtifactError, match="keeps weights in .*; allowed: a file beside it"):
        open_session(file, CPU)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "missing", "short"])
def test_only_plain_whole_files_hold_weights(apart, tmp_path, kind):
    file, data = moved(apart, tmp_path, "x.data"), tmp_path / "x.data"
    content = data.read_bytes()
    data.unlink()
    if kind == "link":
        (tmp_path / "secret").write_bytes(content)
        data.symlink_to(tmp_path / "secret")
    elif kind == "folder":
        data.mkdir()
    elif kind == "pipe":
        os.mkfifo(data)
    elif kind == "short":
        data.write_bytes(content[:10])
    problem = {"link": "is a link", "missing": "no such file", "short": "10 bytes"}.get(kind, "is not a plain file")
    with pytest.raises(ArtifactError, match=f"x.data: {problem}"):
        open_session(file, CPU)


def test_weights_inside_inner_graphs_and_functions_are_found(tmp_path):
    """Wherever ONNX can keep a tensor."""

    def tensor():
        found = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        found.external_data.add(key="location", value="../w")
        return found

    empty = onnx.helper.make_graph([], "inner", [], [])
    inner = onnx.GraphProto()
    inner.CopyFrom(empty)
    inner.initializer.append(tensor())
    sparse = onnx.SparseTensorProto(values=tensor(), dims=[1])
    node = onnx.helper.make_node
    places = {
        "attribute": {"node": [node("Constant", [], ["y"], value=tensor())]},
        "branch": {"node": [node("If", ["c"], ["y"], then_branch=inner, else_branch=empty)]},
        "graphs": {"node": [node("Many", [], ["y"], graphs=[empty, inner])]},
        "tensors": {"node": [node("Many", [], ["y"], tensors=[tensor()])]},
        "sparse attribute": {"node": [node("Constant", [], ["y"], sparse_value=sparse)]},
        "sparse": {"sparse_initializer": [sparse]},
    }
    models = {name: onnx.ModelProto(graph=onnx.GraphProto(**parts)) for name, parts in places.items()}
    function = onnx.FunctionProto(name="f", node=places["attribute"]["node"])
    models["function"] = onnx.ModelProto(functions=[function])
    models["training"] = onnx.ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=inner)])
    for name, model in models.items():
        (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match="keeps weights in '../w'"):
            check_external_data(tmp_path / "x.onnx")
        assert name


def test_damaged_files_are_refused_by_name(apart, tmp_path):
    content, file = apart.read_bytes(), tmp_path / "x.onnx"
    deep = b""
    for _ in range(200):  # a graph inside a node's attribute inside a graph ...
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size = len(deep)
            deep = tag + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + deep
    size = len(deep)
    deep = b"\x3a" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + deep
    for bad in (b"", content[:-3], b"\xff" * 64, b"\x3a\xff\xff\xff\xff\x7f", b"\x0b", b"not an ONNX file", deep):
        file.write_bytes(bad)
        with pytest.raises(ArtifactError, match="x.onnx"):
            open_session(file, CPU)


def test_the_manifest_binds_all_files(tmp_path):
    folder = make_folder(tmp_path / "model", two_time=True)
    model = load_model(folder)
    export_unet(model, folder / FILE, split=True, options=Options(external_data=True, parity=False))
    assert set(load_manifest(folder / FILE).files) == {"unet.onnx.data", "unet.prepare.onnx", "unet.prepare.onnx.data"}
    for name in load_manifest(folder / FILE).files:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        with pytest.raises(ArtifactError, match=f"{name}: its bytes are not those"):
            Pipeline.from_pretrained(folder, backend="onnxruntime")
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=f"{name}: no such file"):
            Pipeline.from_pretrained(folder, backend="onnxruntime")
        (folder / name).write_bytes(content)
    manifest = load_manifest(folder / FILE)
    manifest.files["../x"] = "0"
    save_manifest(folder / FILE, manifest)
    with pytest.raises(ArtifactError, match="'../x'; allowed are names inside the folder"):
        load_manifest(folder / FILE)


# --- providers --------------------------------------------------------------------------------------------------------


def test_a_provider_that_is_not_there_says_what_to_install(apart):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BackendError, match="no CUDAExecutionProvider.*pip install onnxruntime-gpu"):
        open_session(apart, torch.device("cuda"))
    with pytest.raises(BackendError, match="runs on 'cpu' or 'cuda'; device is 'mps'"):
        open_session(apart, torch.device("mps"))


def test_a_provider_that_fell_back_is_an_error(apart, monkeypatch):
    """Onnxruntime lists CUDA, then loads without it."""

    class Fallen:
        def __init__(self, *_, **__):
            pass

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    with pytest.raises(BackendError, match="loaded .'CPUExecutionProvider'. instead of CUDA.*onnxruntime-gpu"):
        open_session(apart, torch.device("cuda"))


def test_a_graph_that_onnxruntime_refuses_is_one_line(tmp_path):
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:])), tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="x.onnx: onnxruntime does not take it") as caught:
        open_session(tmp_path / "x.onnx", CPU)
    assert "\n" not in str(caught.value)


class FakeSession:
    """What a session with a GPU is asked, done on the CPU through the addresses that were bound."""

    def __init__(self):
        self.bound, self.runs = {}, []

    def get_inputs(self):
        return [SimpleNamespace(name="sample", type="tensor(float16)", shape=["batch", 2, "height", "width"])]

    def get_outputs(self):
        return [SimpleNamespace(name="output", type="tensor(float)", shape=["batch", 3, "height", "width"])]

    def io_binding(self):
        def bind(name, kind, index, element, shape, address):
            self.bound[name] = (kind, index, element, shape, address)

        return SimpleNamespace(bind_input=bind, bind_output=bind)

    def run_with_iobinding(self, binding, options):
        import ctypes

        *_, shape, address = self.bound["output"]
        numbers = (ctypes.c_float * int(np.prod(shape))).from_address(address)
        numbers[:] = [float(len(self.runs) + 1)] * len(numbers)
        self.runs.append((dict(self.bound), options))


def test_on_a_gpu_inputs_and_outputs_are_bound_by_address():
    session = FakeSession()
    runner = Runner(session, CPU)
    sample = torch.randn(4, 2, 5, 6)
    half = sample.half()
    results = runner._empty({"sample": half})
    runner._bound({"sample": half}, results, None)
    (bound, options), *rest = session.runs
    assert not rest and options is None
    assert bound["sample"] == ("cpu", 0, 10, [4, 2, 5, 6], half.data_ptr())
    assert bound["output"] == ("cpu", 0, 1, [4, 3, 5, 6], results["output"].data_ptr())
    assert results["output"].shape == (4, 3, 5, 6) and bool((results["output"] == 1).all())


def test_a_size_may_be_a_multiple_of_one_of_the_inputs():
    session = FakeSession()
    grown = SimpleNamespace(name="images", type="tensor(float)", shape=["batch", 3, "8*height", "8*width"])
    session.get_outputs = lambda: [grown]
    assert Runner(session, CPU)._empty({"sample": torch.zeros(4, 2, 5, 6)})["images"].shape == (4, 3, 40, 48)


def test_a_cuda_graph_reads_the_same_addresses_again():
    session = FakeSession()
    runner = Runner(session, CPU, graphs=True)
    first = runner._replayed({"sample": torch.ones(1, 2, 4, 4).half()})["output"]
    second = runner._replayed({"sample": torch.zeros(1, 2, 4, 4).half()})["output"]
    other = runner._replayed({"sample": torch.zeros(2, 2, 4, 4).half()})["output"]
    bound = [run[0] for run in session.runs]
    assert bound[0] == bound[1] and bound[0]["sample"][-1] != bound[2]["sample"][-1]
    assert (float(first.mean()), float(second.mean()), other.shape) == (1.0, 2.0, (2, 3, 4, 4))
    entries = [run[1].get_run_config_entry("gpu_graph_id") for run in session.runs]
    assert entries == ["1", "1", "2"]


def test_an_input_that_is_missing_is_named(apart):
    with pytest.raises(ShapeError, match=r"needs timestep, \['batch'\]; given: sample"):
        Runner(open_session(apart, CPU), CPU)({"sample": torch.zeros(1, 1, 8, 8)})


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_the_split_graphs_sample_like_torch(tmp_path, batch):
    folder = make_folder(tmp_path / "model", two_time=True)
    export_unet(load_model(folder), folder / FILE, split=True, options=Options(parity=False))
    pipes = [Pipeline.from_pretrained(folder, backend=backend) for backend in ("eager", "onnxruntime")]
    for options in ({"num_inference_steps": 3}, {"sampler": "heun", "num_inference_steps": 2, "guidance_scale": 2.0}):
        eager, ours = (
            pipe([i % 3 for i in range(batch)], seed=1, output_type="pt", **options).images for pipe in pipes
        )
        assert eager.std() > 0.01 and (eager - ours).abs().max() <= CLOSE


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Diffusers folders of small text-to-image models with their exported networks."""
    pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fastdiff[test]')")
    pytest.importorskip("transformers", reason="needs transformers (pip install 'fastdiff[text]')")
    import tiny_pipelines as tiny

    folders = {}
    for name in ("stable_diffusion", "stable_diffusion_xl"):
        folder = tmp_path_factory.mktemp(name)
        getattr(tiny, name)(folder).save_pretrained(folder / "model")
        unet = folder / "model" / "unet"
        model = Model(load_unet(unet), ModelInfo(path="scaled_linear", prediction="eps"), unet)
        export_unet(model, unet / FILE)
        folders[name] = folder / "model"
    return folders


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_text_to_image_in_onnxruntime(texts, name):
    pipes = [Pipeline.from_pretrained(texts[name], backend=backend) for backend in ("eager", "onnxruntime")]
    call = {"num_inference_steps": 3, "height": 24, "width": 16, "seed": 1, "output_type": "np"}
    for prompt in ("a cat", ["a cat", "two dogs"]):
        eager, ours = (pipe(prompt, negative_prompt="red", **call).images for pipe in pipes)
        assert eager.std() > 0.01 and np.abs(eager - ours).max() <= CLOSE


def test_what_an_exported_text_model_cannot_do_is_said(texts, tmp_path):
    folder = texts["stable_diffusion"]
    with pytest.raises(ArtifactError, match="missing.onnx: no such file; make it with: fastdiff export"):
        Pipeline.from_pretrained(folder, backend="onnxruntime", artifact=tmp_path / "missing.onnx")
    with pytest.raises(ArtifactError, match="belongs to backend 'onnxruntime' or 'tensorrt', not to 'eager'"):
        Pipeline.from_pretrained(folder, backend="eager", artifact=folder / "unet" / FILE)
    half = tmp_path / "half.onnx"
    model = Model(load_unet(folder / "unet"), ModelInfo(path="scaled_linear", prediction="eps"), folder / "unet")
    export_unet(model, half, options=Options(torch.bfloat16))
    with pytest.raises(BackendError, match="computes in bfloat16, which onnxruntime does on a GPU alone"):
        Pipeline.from_pretrained(folder, backend="onnxruntime", artifact=half)


def test_residuals_and_graphs_must_agree(texts):
    folder = texts["stable_diffusion"]
    network = Pipeline.from_pretrained(folder, backend="onnxruntime").network
    from fastdiff.sampling.denoiser import Cond

    prepared = network.prepare(Cond(None, {"encoder_hidden_states": torch.randn(1, 5, 16)}), torch.ones(1, 1, 2))
    with pytest.raises(PlanError, match="takes no ControlNet: export it with --control"):
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), prepared, [torch.zeros(1)])
    with pytest.raises(PlanError, match="this network reads text"):
        network.prepare(Cond(), torch.ones(1, 1, 2))


def test_adapters_are_inputs(tmp_path):
    """Two at once give what merging both gives; without any the network is itself; others are named."""
    from fastdiff.backends.eager import UNetNetwork
    from fastdiff.backends.ort import network_from, set_adapters
    from fastdiff.benchmarks.layouts import SD15, scaled
    from fastdiff.benchmarks.unet_parity import scramble
    from fastdiff.models.config import UNetConfig
    from fastdiff.models.lora import LoraSet, read_lora
    from fastdiff.models.unet import UNet
    from fastdiff.sampling.denoiser import Cond

    unet = UNet(UNetConfig.from_dict(scaled(SD15, 8) | {"sample_size": 8})).eval().requires_grad_(False)
    scramble(unet, 0)
    model = Model(unet, ModelInfo(path="scaled_linear", prediction="eps"))
    manifest = export_unet(model, tmp_path / FILE, adapters=True)
    # of 10 linear layers of each of 16 transformers, two read the text: those are inputs of the graph that runs once
    assert sum(name.endswith(".lora_up") for name in manifest.inputs) == 16 * 8
    network = network_from(tmp_path / FILE, CPU, None)
    layers = {"attn1.to_q": 3, "attn2.to_k": 2, "attn2.to_out.0": 4, "ff.net.0.proj": 1}
    start, draw = "mid_block.attentions.0.transformer_blocks.0.", torch.Generator().manual_seed(0)

    def adapter(ranks):
        tensors = {}
        for name, rank in ranks.items():
            weight = unet.get_submodule(start + name).weight
            tensors[f"unet.{start}{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=draw)
            tensors[f"unet.{start}{name}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], rank, generator=draw)
        return read_lora(tensors)

    both = [(adapter(layers), 0.7), (adapter({"attn1.to_q": 2}), -0.4)]
    cond = Cond(None, {"encoder_hidden_states": torch.randn(2, 5, 96)})
    x, index, times = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64), torch.full((1, 1, 2), 500.0)

    def run(net):
        return net(x, index, net.prepare(cond, times))

    plain = run(UNetNetwork(unet))
    assert (run(network) - plain).abs().max() <= CLOSE * plain.abs().max()
    loras = LoraSet({"unet": unet})
    for i, (lora, _) in enumerate(both):
        loras.load(str(i), lora)
    loras.set({"0": 0.7, "1": -0.4})
    wanted = run(UNetNetwork(unet))
    set_adapters(network, both)
    assert (wanted - plain).abs().max() > 0.01 * plain.abs().max()
    assert (run(network) - wanted).abs().max() <= CLOSE * wanted.abs().max()
    foreign = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.randn(40, 2, 1, 1),
    }
    with pytest.raises(
        PlanError, match="conv_in.lora_A.weight' changes a layer that the exported graph takes no adapter"
    ):
        set_adapters(network, [(read_lora(foreign), 1.0)])
    assert (run(network) - wanted).abs().max() <= CLOSE * wanted.abs().max()
    set_adapters(network, [])
    assert (run(network) - plain).abs().max() <= CLOSE * plain.abs().max()
    export_unet(model, tmp_path / "fixed.onnx", options=Options(parity=False))
    with pytest.raises(PlanError, match="takes no adapters: export it with --adapters"):
        set_adapters(network_from(tmp_path / "fixed.onnx", CPU, None), both)


def test_a_diffusers_pipeline_runs_its_steps_in_onnxruntime(texts, tmp_path):
    import diffusers

    from fastdiff import optimize, summary

    folder = texts["stable_diffusion"]
    call = {"num_inference_steps": 3, "height": 24, "width": 16, "output_type": "np"}

    def picture(pipe):
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    wanted = picture(pipe)
    other = diffusers.UNet2DConditionModel.from_config(pipe.unet.config)
    with pytest.raises(ArtifactError, match="was made from other weights: its result is off by"):
        optimize(SimpleNamespace(components={"unet": other}), "onnxruntime", folder / "unet" / FILE)
    with pytest.raises(PlanError, match="'auto' alone, 'onnxruntime' with one"):
        optimize(pipe, "onnxruntime")
    optimize(pipe, "onnxruntime", folder / "unet" / FILE)
    assert np.abs(picture(pipe) - wanted).max() <= CLOSE
    text = summary(pipe)
    assert "steps in onnxruntime" in text and "0 left to diffusers" in text
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.5)
    changed = picture(pipe)
    assert np.abs(changed - wanted).max() > CLOSE and "weights changed after the exported graph" in summary(pipe)
