"""Every kind of network as ONNX: valid, strictly inferred, and in onnxruntime what torch makes of it.

Export itself runs the checker, strict shape inference and the comparison with torch; a test passes when it does.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small import make_folder, make_model

onnx = pytest.importorskip("onnx", reason="export needs onnx (pip install 'fastdiff[onnx]')")
pytest.importorskip("onnxruntime", reason="export needs onnxruntime (pip install 'fastdiff[onnx]')")

from fastdiff.artifact import load_manifest  # noqa: E402
from fastdiff.benchmarks.layouts import LAYOUTS, scaled  # noqa: E402
from fastdiff.benchmarks.unet_parity import scramble  # noqa: E402
from fastdiff.errors import PlanError  # noqa: E402
from fastdiff.export.onnx import export_sampler, export_unet  # noqa: E402
from fastdiff.export.publish import Options  # noqa: E402
from fastdiff.export.targets import DTYPES, TARGETS, target_of  # noqa: E402
from fastdiff.models.config import UNetConfig  # noqa: E402
from fastdiff.models.unet import UNet  # noqa: E402
from fastdiff.models.weights import Model, ModelInfo  # noqa: E402

INFO = ModelInfo(path="scaled_linear", prediction="eps")
FLOAT32, FLOAT16, BFLOAT16 = DTYPES.values()


def layout(name: str) -> Model:
    """A published layout at a sixteenth of its width, with at most two transformer layers in a row."""
    config = scaled(LAYOUTS[name], 16) | {"sample_size": 8}
    if isinstance(config.get("transformer_layers_per_block"), list):
        config["transformer_layers_per_block"] = [1, 2, 2]
    if config["_class_name"] == "UNet2DConditionModel" and isinstance(config["attention_head_dim"], int):
        config["attention_head_dim"] = 4
    network = UNet(UNetConfig.from_dict(config))
    scramble(network, 0)
    return Model(network.eval().requires_grad_(False), INFO)


def operators(file: Path) -> set[str]:
    return {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("SSD-1B", "DDPM CelebA")])
def test_every_layout_is_exported(tmp_path, name):
    model = layout(name)
    manifest = export_unet(model, tmp_path / "unet.onnx")
    reads = model.network.config.conditional
    assert manifest.kind == ("step" if reads else "unet") and len(manifest.parity) == 3
    assert manifest.inputs["sample"][1] == ["batch", model.network.config.in_channels, "height", "width"]
    if reads:
        made = onnx.load(tmp_path / "unet.prepare.onnx").graph
        assert {entry.name for entry in made.output} == manifest.inputs.keys() - {"sample"}
        assert not any(
            "to_k" in node.name or "time_emb" in node.name for node in _step(tmp_path) if "attn2" in node.name
        )


def _step(folder: Path) -> Any:
    return onnx.load(folder / "unet.onnx").graph.node


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["SD 2.1", "ADM"])
def test_every_type_and_target(tmp_path, name, dtype, target):
    manifest = export_unet(layout(name), tmp_path / "unet.onnx", options=Options(dtype, target))
    assert manifest.opset == target_of(target, None, dtype).opset
    assert manifest.dtype == str(dtype).removeprefix("torch.") and bool(manifest.parity) == (dtype != BFLOAT16)
    found = operators(tmp_path / "unet.onnx")
    assert ("GroupNormalization" in found) == target.startswith("tensorrt")
    assert ("Attention" in found) == (target == "tensorrt-rtx")
    assert ("MultiHeadAttention" in found) == (target == "onnxruntime")
    graph = onnx.load(tmp_path / "unet.onnx").graph
    types = {tensor.data_type for tensor in graph.initializer if tensor.name.endswith("conv1.weight")}
    assert types == {{FLOAT32: 1, FLOAT16: 10, BFLOAT16: 16}[dtype]}


def test_half_precision_keeps_the_logits_of_sd21_in_float32(tmp_path):
    """Its config says upcast_attention: they overflow float16."""
    export_unet(layout("SD 2.1"), tmp_path / "unet.onnx", options=Options(FLOAT16, "tensorrt"))
    model = onnx.load(tmp_path / "unet.onnx")
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    softmax = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert softmax and {types[node.output[0]] for node in softmax} == {onnx.TensorProto.FLOAT}


def test_an_opset_that_does_not_suit_is_refused(tmp_path):
    for opset, dtype, allowed in ((17, FLOAT32, "18 to 23"), (24, FLOAT32, "18 to 23"), (21, BFLOAT16, "22 to 23")):
        with pytest.raises(PlanError, match=f"opset is {opset}; allowed for {dtype}: {allowed}"):
            export_unet(make_model(), tmp_path / "x.onnx", options=Options(dtype, opset=opset))
    with pytest.raises(PlanError, match="target is 'coreml'; allowed: onnxruntime"):
        export_unet(make_model(), tmp_path / "x.onnx", options=Options(target="coreml"))


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_older_and_newer_opsets(tmp_path, opset):
    assert (
        export_unet(layout("SD 1.5"), tmp_path / "x.onnx", options=Options(target="onnx", opset=opset)).opset == opset
    )


def test_one_graph_for_text_and_two_for_labels(tmp_path):
    whole = export_unet(layout("SDXL"), tmp_path / "whole.onnx", split=False)
    assert whole.kind == "unet" and whole.inputs.keys() >= {"encoder_hidden_states", "text_embeds", "time_ids"}
    split = export_unet(make_model(two_time=True), tmp_path / "split.onnx", split=True)
    assert split.kind == "step" and split.inputs.keys() == {"sample", "time_rows"}


@pytest.mark.parametrize("split", [True, False])
def test_residuals_of_controlnets_are_inputs(tmp_path, split):
    manifest = export_unet(layout("SD 1.5"), tmp_path / "unet.onnx", control=True, split=split)
    assert sum(name.startswith("control_") for name in manifest.inputs) == 13


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SD inpainting"])
def test_a_guided_text_sampler_is_one_graph(tmp_path, name):
    manifest = export_sampler(layout(name), tmp_path / "sampler.onnx", 2, "dpmpp_2m", 5.0)
    assert manifest.outputs["latents"][1] == ["batch", 4, 8, 8]
    assert {name for name in manifest.inputs if name.startswith("negative_")} >= {"negative_encoder_hidden_states"}
    nodes = onnx.load(tmp_path / "sampler.onnx").graph.node
    assert sum(node.name.endswith("attn2/MultiHeadAttention_1") for node in nodes) > 0


def test_the_same_bytes_in_every_process(tmp_path):
    """Also where hashes of strings differ; weights in a file of their own and in the graph."""
    folder = make_folder(tmp_path / "model", two_time=True)
    program = (
        "import sys; from fastdiff.export.onnx import export_unet; "
        "from fastdiff.export.publish import Options; from fastdiff.models.weights import load_model; "
        "from pathlib import Path; "
        "[export_unet(load_model(sys.argv[1]), Path(sys.argv[2]) / how, split=True, options=Options("
        "external_data=how == 'apart.onnx', parity=False)) for how in ('apart.onnx', 'inside.onnx')]"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program, str(folder), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"})
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / seed).iterdir()} for seed in "12")
    assert first == second and "apart.onnx.data" in first and "inside.onnx.data" not in first


def test_weights_in_a_file_of_their_own(tmp_path):
    model = make_model()
    inside = export_unet(model, tmp_path / "inside.onnx")
    apart = export_unet(model, tmp_path / "apart.onnx", options=Options(external_data=True))
    assert list(apart.files) == ["apart.onnx.data"] and not inside.files
    assert (tmp_path / "apart.onnx").stat().st_size < (tmp_path / "inside.onnx").stat().st_size / 2
    assert load_manifest(tmp_path / "apart.onnx") == apart


def test_the_error_of_every_layer(tmp_path):
    report = export_unet(layout("SD 1.5"), tmp_path / "unet.onnx", options=Options(FLOAT16, per_layer=True)).parity
    names = {name for name, module in layout("SD 1.5").network.named_modules()}
    assert len(report["layers"]) > 100 and report["layers"].keys() <= names
    assert all(0 <= error["exported"] < 0.02 for error in report["layers"].values())
    text = (tmp_path / "unet.onnx.parity.txt").read_text()
    assert "mid_block.attentions.0" in text and "batch 3" in text


def test_the_network_is_left_as_it_was(tmp_path):
    model = make_model()
    before, ops = {name: id(p) for name, p in model.network.named_parameters()}, model.network.ops
    export_unet(model, tmp_path / "x.onnx")
    assert {name: id(p) for name, p in model.network.named_parameters()} == before and model.network.ops is ops
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())


def test_a_function_without_counterpart_is_named(tmp_path):
    model = make_model()
    model.network.conv_out.forward = lambda x: torch.cumsum(x, 1)
    with pytest.raises(PlanError, match="torch's cumsum has no counterpart"):
        export_unet(model, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_a_small_sampler_at_another_size(tmp_path):
    model = make_model(two_time=True)
    manifest = export_sampler(model, tmp_path / "x.onnx", 1, size=(12, 8))
    assert manifest.outputs["images"][1] == ["batch", 1, 10, 6]
    with pytest.raises(PlanError, match="num_inference_steps is 0; allowed: 1 to 1000"):
        export_sampler(model, tmp_path / "y.onnx", 0)
    network = model.network
    network.config = dataclasses.replace(network.config, sample_size=None)
    with pytest.raises(PlanError, match="give size"):
        export_sampler(model, tmp_path / "y.onnx", 1)


def test_a_graph_for_one_size_doubles_images_with_fewer_products(tmp_path):
    """Four convolutions of 2x2 in the place of an enlargement and one of 3x3; other targets keep the weights whole."""
    model = layout("SD 1.5")
    sizes, ops = {}, {}
    for name, options in (
        ("any", Options()), ("one", Options(size=(16, 24))), ("engine", Options(size=(16, 24), target="tensorrt")),
    ):  # fmt: skip
        file = tmp_path / f"{name}.onnx"
        export_unet(model, file, split=False, options=options)  # measures the error, or raises
        graph = onnx.load(file).graph
        ops[name] = Counter(node.op_type for node in graph.node)
        (sample,) = (given for given in graph.input if given.name == "sample")
        sizes[name] = [axis.dim_value for axis in sample.type.tensor_type.shape.dim]
    assert sizes["one"] == [0, 4, 16, 24] and sizes["any"] == [0, 4, 0, 0]
    assert ops["any"]["Resize"] == ops["engine"]["Resize"] == 3 and ops["one"]["Resize"] == 0
    assert ops["one"]["DepthToSpace"] == 3 and ops["one"]["Conv"] == ops["any"]["Conv"] + 9
