"""Engines of the project's own networks, built here for GPUs that are not: precisions and shapes, read back."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="builds need TensorRT for RTX (pip install 'fastdiff[tensorrt-rtx]')")

from fastdiff.benchmarks.engine_builds import ARCHITECTURES, PRECISIONS, digits, engines, in_precision, layout  # noqa: E402
from fastdiff.benchmarks.layouts import SD15, SDXL  # noqa: E402

TYPES = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
# An eighth of the widths; the depth is cut too, as a build costs as much as the network has layers.
SMALL = {
    "sd15": (SD15, {"layers_per_block": 1, "transformer_layers_per_block": 1}),
    "sdxl": (SDXL, {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2]}),
}


@TYPES
def test_the_bundled_model(tmp_path, dtype):
    (built,) = engines(digits(), dtype, tmp_path, ARCHITECTURES).values()
    precision = PRECISIONS[dtype]
    assert built.layers[f"CONVOLUTION {precision}"] == 47 and built.layers[f"ATTENTION_OUTPUT {precision}"] == 4
    assert [in_precision(built, other) for other in PRECISIONS] == [other == dtype for other in PRECISIONS]
    assert built.inputs == {
        "sample": ["FLOAT", [-1, 1, -1, -1]], "timestep": ["FLOAT", [-1]], "class_labels": ["INT64", [-1]],
        "target": ["FLOAT", [-1]],
    }  # fmt: skip
    assert built.outputs == {"output": ["FLOAT", [-1, 1, -1, -1]]}
    assert built.profiles[0]["sample"] == ((1, 1, 32, 32), (2, 1, 32, 32), (4, 1, 32, 32))


@pytest.mark.parametrize("name", SMALL)
@TYPES
def test_text_to_image_layouts(tmp_path, name, dtype):
    config, changes = SMALL[name]
    case = layout(config, **changes)
    built = engines(case, dtype, tmp_path, ARCHITECTURES)
    step, prepare = built["unet.onnx"], built["unet.prepare.onnx"]
    assert in_precision(step, dtype) and in_precision(prepare, dtype)
    network, precision = case.model.network, PRECISIONS[dtype]
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    crossing = len(list(network.crossing()))
    assert step.layers[f"ATTENTION_OUTPUT {precision}"] == 2 * crossing  # each also reads itself
    assert 0 < step.layers[f"CONVOLUTION {precision}"] <= convolutions
    pairs = [f"{kind}_{i}" for i in range(crossing) for kind in ("keys", "values")]
    assert list(step.inputs) == ["sample", "time_rows", *pairs] and list(prepare.outputs) == ["time_rows", *pairs]
    for pair in pairs:
        assert step.inputs[pair] == prepare.outputs[pair] and step.inputs[pair][0] == precision
    assert step.profiles[0]["sample"] == ((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 32))
    assert step.outputs == {"output": ["FLOAT", [-1, 4, -1, -1]]}
