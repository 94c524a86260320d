"""Decoders, ControlNets, and what a float16 graph keeps in float32."""

from __future__ import annotations

import json

import pytest
import torch
from small import make_model

onnx = pytest.importorskip("onnx", reason="export needs onnx (pip install 'fastdiff[onnx]')")
pytest.importorskip("onnxruntime", reason="export needs onnxruntime (pip install 'fastdiff[onnx]')")

from fastdiff.artifact import load_manifest  # noqa: E402
from fastdiff.benchmarks.layouts import SD15, SDXL, scaled  # noqa: E402
from fastdiff.benchmarks.unet_parity import scramble  # noqa: E402
from fastdiff.export.onnx import export_unet  # noqa: E402
from fastdiff.export.parts import export_controlnet, export_decoder  # noqa: E402
from fastdiff.export.publish import Options  # noqa: E402
from fastdiff.export.ranges import MOST, too_large  # noqa: E402
from fastdiff.export.targets import DTYPES  # noqa: E402
from fastdiff.models.autoencoder import AutoencoderKL, AutoencoderKLConfig  # noqa: E402
from fastdiff.models.controlnet import ControlNet, ControlNetConfig  # noqa: E402
from fastdiff.models.tiny_autoencoder import AutoencoderTiny, AutoencoderTinyConfig  # noqa: E402

WIDTHS = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8),
          "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}  # fmt: skip


def autoencoder(**more):
    config = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 3,
              "up_block_types": ("UpDecoderBlock2D",) * 3} | more  # fmt: skip
    codec = AutoencoderKL(AutoencoderKLConfig(**config)).eval().requires_grad_(False)
    scramble(codec, 0)
    return codec


def tiny_autoencoder(**more):
    codec = AutoencoderTiny(AutoencoderTinyConfig(**WIDTHS, **more)).eval().requires_grad_(False)
    scramble(codec, 0)
    return codec


CODECS = {
    "kl": autoencoder,
    "kl with latents_mean": lambda: autoencoder(latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 1.5, 0.5)),
    "tiny": tiny_autoencoder,
    "tiny with pools": lambda: tiny_autoencoder(decoder_pools=(True, False, False)),
    "tiny with mish": lambda: tiny_autoencoder(act_fn="mish"),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_every_decoder_is_exported(tmp_path, name, dtype):
    manifest = export_decoder(CODECS[name](), tmp_path / "decoder.onnx", options=Options(dtype))
    assert manifest.kind == "decoder" and manifest.inputs["latents"][1] == ["batch", 4, "height", "width"]
    assert manifest.outputs["images"][1] == ["batch", 3, "4*height", "4*width"]
    assert len(manifest.parity) == (0 if dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("base", [SD15, SDXL], ids=["SD 1.5", "SDXL"])
def test_a_controlnet_is_exported(tmp_path, base, dtype):
    config = scaled(base, 8) | {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [4, 8, 8, 8]}
    if isinstance(config.get("transformer_layers_per_block"), list):
        config["transformer_layers_per_block"] = [1, 1, 1]
    unused = ("out_channels", "up_block_types", "sample_size", "center_input_sample")
    net = ControlNet(ControlNetConfig.from_dict({k: v for k, v in config.items() if k not in unused}))
    scramble(net, 0)
    net.eval().requires_grad_(False)
    manifest = export_controlnet(net, tmp_path / "controlnet.onnx", options=Options(dtype))
    assert manifest.kind == "controlnet" and len(manifest.outputs) == len(net.skips) + 1
    once = onnx.load(tmp_path / "controlnet.prepare.onnx").graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in once.input}
    assert shapes["picture"] == ["batch", 3, "8*height", "8*width"]
    assert {v.name for v in once.output} == manifest.inputs.keys() - {"sample"}
    if dtype != torch.bfloat16:
        errors = manifest.parity["batch 2, 16x8"]
        assert errors["outputs"].keys() == manifest.outputs.keys()
        assert errors["exported"] == max(error["exported"] for error in errors["outputs"].values())


def test_what_overflows_float16_stays_in_float32(tmp_path):
    """Two layers give numbers beyond its range; what comes after them is small again, so the result is right."""
    model = make_model()
    block = model.network.down_blocks[0].resnets[0]
    block.conv1.weight.data *= 1e6  # the norm behind it brings that back
    attention = model.network.mid_block.attentions[0]
    for layer in (attention.to_q, attention.to_k):
        layer.weight.data *= 1000
    manifest = export_unet(model, tmp_path / "unet.onnx", options=Options(torch.float16, "tensorrt"))
    kept = manifest.ranges["kept_in_float32"]
    assert kept.keys() == {"down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.logits"}
    assert all(float(largest) > MOST for largest in kept.values()) and manifest.ranges["limit"] == MOST
    graph = onnx.load(tmp_path / "unet.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["down_blocks.0.resnets.0.conv1.weight"] == 1 and types["down_blocks.0.resnets.0.conv2.weight"] == 10
    assert load_manifest(tmp_path / "unet.onnx") == manifest and json.dumps(manifest.ranges)


def test_nothing_is_kept_where_nothing_overflows(tmp_path):
    report = export_unet(make_model(), tmp_path / "unet.onnx", options=Options(torch.float16)).ranges
    assert report["kept_in_float32"] == {} and len(report["largest_of_the_rest"]) == 10
    assert export_unet(make_model(), tmp_path / "unet.onnx").ranges == {}
    assert too_large({"a": float("nan"), "b": float("inf"), "c": 1.0}).keys() == {"a", "b"}
