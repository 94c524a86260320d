"""Enlargement and the convolution behind it, as four small convolutions: 16 products for every 36."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.export.layers import fitted
from fastdiff.export.symbol import Symbol
from fastdiff.kernels import reference


def upsample_conv(x: Any, weight: Any, bias: Any, size: tuple[Any, Any]) -> Any:
    """``reference.upsample_conv``. Where the size is known to double, each of the four pixels that a pixel becomes is a
    2x2 convolution of the small image; the four results are dealt out to their places.

    onnxruntime alone gets it so: engines are refitted with weights by their names.
    """
    if isinstance(x, Tensor) or not x.graph.target.own or tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
        return reference.upsample_conv(x, weight, bias, size)
    x, graph = fitted(x, weight), x.graph
    parts: list[Symbol] = []
    for a in (0, 1):
        for b in (0, 1):
            inputs = [x, graph.corner(weight, (a, b)), *([] if bias is None else [bias])]
            how = {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [1 - a, 1 - b, a, b]}
            shape = (x.shape[0], weight.shape[0], *x.shape[2:])
            parts.append(graph.node("Conv", inputs, shape, x.dtype, **how))
    four = (x.shape[0], 4 * weight.shape[0], *x.shape[2:])
    side_by_side = graph.node("Concat", parts, four, x.dtype, axis=1)
    shape = (x.shape[0], weight.shape[0], *size)
    return graph.node("DepthToSpace", [side_by_side], shape, x.dtype, blocksize=2, mode="DCR")
