"""An ONNX graph small enough to build an engine of in a tenth of a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

CHANNELS = 8


def tiny_graph(file: Path, dtype: type = np.float32, seed: int = 0) -> Path:
    """Write ``y = SiLU(GroupNorm(conv(x)))``, ``x [batch, 1, height, width]``, all sizes but the channels dynamic."""
    draw = np.random.default_rng(seed).standard_normal
    weights = [
        numpy_helper.from_array(np.asarray(values).astype(dtype), name)
        for name, values in (
            ("conv.weight", draw((CHANNELS, 1, 3, 3))),
            ("conv.bias", draw(CHANNELS)),
            ("norm.weight", draw(CHANNELS)),
            ("norm.bias", draw(CHANNELS)),
        )
    ]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("GroupNormalization", ["c", "norm.weight", "norm.bias"], ["n"], name="norm", num_groups=4),
        helper.make_node("Sigmoid", ["n"], ["s"], name="sigmoid"),
        helper.make_node("Mul", ["n", "s"], ["y"], name="mul"),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = [
        [helper.make_tensor_value_info(name, kind, ["batch", channels, "height", "width"])]
        for name, channels in (("x", 1), ("y", CHANNELS))
    ]
    graph = helper.make_graph(nodes, "tiny", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return file
