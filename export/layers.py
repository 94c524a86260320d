"""What the layers of networks become: convolutions, products with weights, norms, attention, activations, resizing."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.export.dims import Size
from fastdiff.export.graph import OWN
from fastdiff.export.operators import as_symbol, binary, cast
from fastdiff.export.ranges import LOGITS
from fastdiff.export.shapes import permute, reshape
from fastdiff.export.symbol import Symbol, becomes


@becomes(F.conv2d)
def conv2d(
    x: Symbol, weight: Symbol, bias: Symbol | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Symbol:  # fmt: skip
    """A convolution; with an adapter, also that of its two factors."""
    x, stride, padding = fitted(x, weight), _pair(stride), _pair(padding)
    kernel = tuple(int(size) for size in weight.shape[2:])  # type: ignore[arg-type]
    if _pair(dilation) != (1, 1) or groups != 1:
        raise PlanError(f"a convolution of dilation {dilation} and {groups} groups is not exported")
    shape = (x.shape[0], weight.shape[0], *map(_after, x.shape[2:], kernel, stride, padding))
    inputs = [x, weight] if bias is None else [x, weight, bias]
    how = {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*padding, *padding]}
    made = x.graph.node("Conv", inputs, shape, x.dtype, **how)
    return made  # type: ignore[no-any-return]


def fitted(x: Symbol | Tensor, weight: Symbol) -> Symbol:
    """What a layer reads, in the type in which it computes: that of its weights."""
    return as_symbol(weight.graph, x, weight.dtype)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _after(size: Size, kernel: int, stride: int, padding: int) -> Size:
    return (size + (2 * padding - kernel)) // stride + 1


@becomes(F.linear)
def linear(x: Symbol, weight: Symbol, bias: Symbol | None = None) -> Symbol:
    """A product with a matrix, held with its axes swapped; with an adapter, also that of its factors."""
    x, graph = fitted(x, weight), weight.graph
    swapped = graph.weight(weight.weight.name, weight.weight.source, weight.dtype, weight.shape[::-1], swapped=True)
    shape = (*x.shape[:-1], weight.shape[0])
    made = graph.node("MatMul", [x, swapped], shape, x.dtype)
    adapter = graph.adapters.get(weight.weight.name)
    if adapter is not None:
        down, up = (cast(factor, x.dtype) for factor in adapter)
        low = graph.node("MatMul", [x, down], (*x.shape[:-1], down.shape[1]), x.dtype)
        made = made + graph.node("MatMul", [low, up], shape, x.dtype)
    made = made if bias is None else made + bias
    if graph.target.own and adapter is None:
        made.parts = lambda start, stop: linear(
            x, graph.part(weight, start, stop), bias and graph.part(bias, start, stop)
        )
    return made  # type: ignore[no-any-return]


@becomes(F.group_norm)
def group_norm(x: Symbol, groups: int, weight: Symbol, bias: Symbol, eps: float) -> Symbol:
    """Statistics are float32 whatever ``x`` is: sums over half a million numbers overflow float16."""
    graph, result = x.graph, weight.dtype
    x, weight, bias = _widest(x, weight, bias)
    if graph.target.group_norm:
        inputs = [x, weight, bias]
        return cast(graph.node("GroupNormalization", inputs, x.shape, x.dtype, num_groups=groups, epsilon=eps), result)
    wide = cast(x, torch.float32)
    rows = reshape(wide, x.shape[0], groups, -1)
    ones = graph.constant(torch.ones(groups))
    zeros = graph.constant(torch.zeros(groups))
    normal = graph.node("InstanceNormalization", [rows, ones, zeros], rows.shape, torch.float32, epsilon=eps)
    y = cast(reshape(normal, *x.shape), x.dtype)
    return cast(y * graph.column(weight) + graph.column(bias), result)


def _widest(x: Symbol, weight: Symbol, bias: Symbol) -> tuple[Symbol, Symbol, Symbol]:
    """What a norm reads, of one type: what was kept in float32 is brought back to a range for less behind the norm."""
    if x.dtype != torch.float32 or weight.dtype == torch.float32:
        return fitted(x, weight), weight, bias
    parts = (x.graph.weight(p.weight.name, p.weight.source, torch.float32, p.shape) for p in (weight, bias))
    return x, *parts


@becomes(F.layer_norm)
def layer_norm(x: Symbol, size: Any, weight: Symbol, bias: Symbol, eps: float = 1e-5) -> Symbol:
    """Over the last axis; its statistics are float32 by the operator's own definition."""
    result = weight.dtype
    x, weight, bias = _widest(x, weight, bias)
    return cast(x.graph.node("LayerNormalization", [x, weight, bias], x.shape, x.dtype, axis=-1, epsilon=eps), result)


@becomes(F.scaled_dot_product_attention)
def attention(q: Symbol, k: Symbol, v: Symbol, *, is_causal: bool = False) -> Symbol:
    """``[N, heads, L, d]`` and ``[N, heads, M, d]`` twice; the queries are scaled first, so that less overflows."""
    if q.dtype != torch.float32 and f"{q.graph.here}.{LOGITS}" in q.graph.wide:
        return cast(attention(*(cast(part, torch.float32) for part in (q, k, v)), is_causal=is_causal), q.dtype)
    k, v = cast(k, q.dtype), cast(v, q.dtype)
    graph, shape, scale = q.graph, (*q.shape[:-1], v.shape[-1]), 1 / math.sqrt(int(q.shape[-1]))  # type: ignore[arg-type]
    if graph.target.attention:
        how = {"is_causal": 1} if is_causal else {}
        return graph.node("Attention", [q, k, v], shape, q.dtype, scale=scale, **how)  # type: ignore[no-any-return]
    if graph.target.own:
        return _fused_attention(q, k, v, scale, is_causal)
    keys = permute(k, 0, 1, 3, 2)
    logits = graph.node("MatMul", [q * scale, keys], (*q.shape[:-1], k.shape[2]), q.dtype)
    if is_causal:
        later = torch.full((int(q.shape[2]), int(k.shape[2])), -torch.inf).triu(1)  # type: ignore[arg-type]
        logits = logits + graph.constant(later.to(q.dtype))
    shares = graph.node("Softmax", [logits], logits.shape, q.dtype, axis=-1)
    return graph.node("MatMul", [shares, v], shape, q.dtype)  # type: ignore[no-any-return]


def _fused_attention(q: Symbol, k: Symbol, v: Symbol, scale: float, is_causal: bool) -> Symbol:
    """Onnxruntime's own operator, which never holds all logits; it reads and writes ``[N, L, heads * d]``."""
    heads, together = int(q.shape[1]), []  # type: ignore[arg-type]
    for part in (q, k, v):
        rows = permute(part, 0, 2, 1, 3)
        together.append(reshape(rows, *rows.shape[:2], heads * int(rows.shape[3])))  # type: ignore[arg-type]
    shape = (*together[0].shape[:2], together[2].shape[2])
    how = {"num_heads": heads, "scale": scale, "domain": OWN} | ({"unidirectional": 1} if is_causal else {})
    mixed = q.graph.node("MultiHeadAttention", together, shape, q.dtype, **how)
    return permute(reshape(mixed, *shape[:2], heads, -1), 0, 2, 1, 3)


@becomes(F.embedding)
def embedding(index: Symbol, weight: Symbol, *_: Any, **__: Any) -> Symbol:
    """Rows of a table."""
    return index.graph.node("Gather", [weight, index], (*index.shape, *weight.shape[1:]), weight.dtype, axis=0)  # type: ignore[no-any-return]


# --- activations ------------------------------------------------------------------------------------------------------


@becomes(F.silu)
def silu(x: Symbol, inplace: bool = False) -> Symbol:
    """``x * sigmoid(x)``."""
    return binary("Mul", x, x.graph.node("Sigmoid", [x], x.shape, x.dtype))


@becomes(F.gelu)
def gelu(x: Symbol, approximate: str = "none") -> Symbol:
    """Exact GELU; an operator of its own from opset 20 on."""
    if approximate != "none":
        raise PlanError(f"GELU approximated by {approximate!r} is not exported")
    if x.graph.target.opset >= 20:
        return x.graph.node("Gelu", [x], x.shape, x.dtype)  # type: ignore[no-any-return]
    share = x.graph.node("Erf", [x * math.sqrt(0.5)], x.shape, x.dtype) + 1
    return x * share * 0.5  # type: ignore[no-any-return]


@becomes(F.relu, torch.relu)
def relu(x: Symbol, inplace: bool = False) -> Symbol:
    """``max(x, 0)``."""
    return x.graph.node("Relu", [x], x.shape, x.dtype)  # type: ignore[no-any-return]


@becomes(F.mish)
def mish(x: Symbol, inplace: bool = False) -> Symbol:
    """``x * tanh(softplus(x))``."""
    return x.graph.node("Mish", [x], x.shape, x.dtype)  # type: ignore[no-any-return]


# --- resampling -------------------------------------------------------------------------------------------------------


@becomes(F.pad)
def pad(x: Symbol, sizes: Any, mode: str = "constant", value: float | None = None) -> Symbol:
    """Zeros around the image."""
    if mode != "constant" or value:
        raise PlanError(f"padding of mode {mode!r} is not exported")
    before, after = [0] * x.dim(), [0] * x.dim()
    for i in range(len(sizes) // 2):
        before[-1 - i], after[-1 - i] = sizes[2 * i], sizes[2 * i + 1]
    if not any(before + after):
        return x
    shape = tuple(size + (b + a) for size, b, a in zip(x.shape, before, after, strict=True))
    given = x.graph.constant(torch.tensor(before + after, dtype=torch.int64))
    return x.graph.node("Pad", [x, given], shape, x.dtype)  # type: ignore[no-any-return]


@becomes(F.avg_pool2d)
def avg_pool2d(x: Symbol, size: int) -> Symbol:
    """Means of squares of pixels."""
    shape = (*x.shape[:2], *(_after(side, size, size, 0) for side in x.shape[2:]))
    return x.graph.node("AveragePool", [x], shape, x.dtype, kernel_shape=[size] * 2, strides=[size] * 2)  # type: ignore[no-any-return]


@becomes(F.interpolate)
def interpolate(x: Symbol, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **_: Any) -> Symbol:
    """Enlargement by repetition; where the size is twice the old one, whatever that is, by a factor."""
    if mode != "nearest":
        raise PlanError(f"interpolation of mode {mode!r} is not exported")
    graph, how = x.graph, {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if size is None:
        pair = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor, scale_factor)
        if any(float(factor) != int(factor) for factor in pair):
            raise PlanError(f"interpolation by {scale_factor} is not exported; allowed: whole factors")
        size = tuple(side * int(factor) for side, factor in zip(x.shape[2:], pair, strict=True))
    shape = (*x.shape[:2], *size)
    factors = [_factor(new, old) for new, old in zip(size, x.shape[2:], strict=True)]
    if all(factors):
        scales = graph.constant(torch.tensor([1.0, 1.0, *factors]))
        return graph.node("Resize", [x, "", scales], shape, x.dtype, **how)  # type: ignore[no-any-return]
    return graph.node("Resize", [x, "", "", graph.sizes(shape)], shape, x.dtype, **how)  # type: ignore[no-any-return]


def _factor(new: Size, old: Size) -> float | None:
    """By which whole number a size grew, if that is known."""
    return next((float(factor) for factor in range(1, 17) if old * factor == new), None)
