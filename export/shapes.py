"""What torch's functions become in a graph: sizes, axes, parts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.export.dims import Dim, Shape, Size, product, quotient
from fastdiff.export.operators import Value, as_symbol, graph_of, repeated, shown_shape
from fastdiff.export.symbol import Symbol, becomes


class Largest(NamedTuple):
    """What ``topk`` returns, as far as it is exported."""

    values: Symbol


@becomes(torch.topk, method="topk")
def topk(x: Symbol, count: int) -> Largest:
    """The largest numbers along the last axis, falling."""
    graph, shape = x.graph, (*x.shape[:-1], count)
    return Largest(graph.node("TopK", [x, graph.sizes([count])], shape, x.dtype, others=1, axis=-1))


@becomes(torch.take_along_dim)
def take_along_dim(x: Symbol, index: Tensor, dim: int) -> Symbol:
    """The place along the last axis that is known and the same in every row."""
    if dim != x.dim() - 1 or index.numel() != 1:
        raise PlanError("places that differ from image to image have no counterpart in exported graphs")
    at = int(index)
    return sliced(x, dim, at, at + 1)


@becomes(torch.argmax, method="argmax")
def argmax(x: Symbol, dim: int) -> Symbol:
    """The place of the largest number along the last axis, the first one where several are as large."""
    if dim not in (-1, x.dim() - 1):
        raise PlanError(f"argmax along axis {dim} is not exported; allowed: the last")
    return x.graph.node("ArgMax", [x], x.shape[:-1], torch.int64, axis=-1, keepdims=0)  # type: ignore[no-any-return]


@becomes(torch.reshape, torch.Tensor.view, torch.Tensor.reshape, method="reshape")
def reshape(x: Symbol, *sizes: Any) -> Symbol:
    """Other sizes for the same numbers, one of which may be -1."""
    given = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    shape = _completed(x.shape, given)
    if shape == x.shape:
        return x
    if x.folded is not None and x.folded.shape == shape:
        return x.folded
    if x.known is not None:
        held = [size if isinstance(size, int) and size <= x.known.numel() else 1 for size in shape]
        return repeated(x.graph.constant(x.known.reshape(held)), shape)
    if x.weight is not None:
        raise PlanError(f"weight {x.name} cannot be reshaped in an exported graph")
    plain: list[Size] = [
        0 if isinstance(size, Dim) and i < x.dim() and size == x.shape[i] else size for i, size in enumerate(shape)
    ]
    open_ones = [i for i, size in enumerate(plain) if isinstance(size, Dim)]
    if len(open_ones) == 1:
        plain[open_ones[0]] = -1
    made = x.graph.node("Reshape", [x, x.graph.sizes(plain)], shape, x.dtype)
    made.folded = x
    return made  # type: ignore[no-any-return]


@becomes(method="view")
def view(x: Symbol, *sizes: Any) -> Symbol:
    """As ``reshape``."""
    return reshape(x, *sizes)


def _completed(old: Shape, new: Sequence[Any]) -> Shape:
    """Sizes without -1."""
    if -1 not in [size for size in new if isinstance(size, int)]:
        return tuple(new)
    missing = quotient(old, [size for size in new if not isinstance(size, int) or size != -1])
    if missing is None:
        raise PlanError(f"a size of {shown_shape(old)} in place of -1 in {shown_shape(tuple(new))} is not known")
    return tuple(missing if isinstance(size, int) and size == -1 else size for size in new)


@becomes(torch.flatten, torch.Tensor.flatten, method="flatten")
def flatten(x: Symbol, start: int = 0) -> Symbol:
    """Axes from ``start`` on become one; of a weight the file then holds it so."""
    if x.weight is not None and x.known is None:
        shape = (*x.shape[:start], int(product(x.shape[start:])))  # type: ignore[arg-type]
        return x.graph.weight(x.weight.name, x.weight.source, x.dtype, shape)  # type: ignore[no-any-return]
    return reshape(x, *x.shape[:start], product(x.shape[start:]))


@becomes(torch.permute, torch.Tensor.permute, method="permute")
def permute(x: Symbol, *order: Any) -> Symbol:
    """Axes in another order; a transposition of a transposition is one."""
    given: Sequence[int] = order[0] if len(order) == 1 and isinstance(order[0], tuple | list) else order
    root, perm = x, tuple(given)
    if x.moved is not None:
        root, before = x.moved
        perm = tuple(before[i] for i in perm)
    if perm == tuple(range(root.dim())):
        return root
    shape = tuple(root.shape[i] for i in perm)
    made = x.graph.node("Transpose", [root], shape, x.dtype, perm=list(perm))
    made.moved = root, perm
    return made  # type: ignore[no-any-return]


@becomes(torch.transpose, torch.Tensor.transpose, method="transpose")
def transpose(x: Symbol, one: int, other: int) -> Symbol:
    """Two axes swapped."""
    order = list(range(x.dim()))
    order[one], order[other] = order[other], order[one]
    return permute(x, *order)


@becomes(torch.cat, torch.concat)
def cat(parts: Sequence[Value], dim: int = 0, axis: int | None = None) -> Symbol:
    """Parts side by side."""
    graph = graph_of(*parts)
    first = next(part for part in parts if isinstance(part, Symbol))
    values = [as_symbol(graph, part, first.dtype) for part in parts]
    at = (dim if axis is None else axis) % first.dim()
    total_size: Size = 0
    for value in values:
        total_size = value.shape[at] + total_size
    shape = (*first.shape[:at], total_size, *first.shape[at + 1 :])
    if all(value.known is not None and torch.equal(value.known, values[0].known) for value in values) and (
        isinstance(total_size, Dim) and values[0].known.shape[at] == 1
    ):
        return repeated(values[0], shape)  # the same number for every image of a batch
    return graph.node("Concat", values, shape, first.dtype, axis=at)  # type: ignore[no-any-return]


@becomes(torch.split, torch.Tensor.split, method="split")
def split(x: Symbol, sizes: Sequence[int], dim: int = 0) -> list[Symbol]:
    """Consecutive parts along an axis."""
    parts, start = [], 0
    for size in sizes:
        parts.append(sliced(x, dim % x.dim(), start, start + size))
        start += size
    return parts


@becomes(torch.chunk, torch.Tensor.chunk, method="chunk")
def chunk(x: Symbol, count: int, dim: int = 0) -> list[Symbol]:
    """Equal parts along an axis whose size is known."""
    size = x.shape[dim]
    if not isinstance(size, int) or size % count:
        raise PlanError(f"{size} cannot be cut into {count} equal parts in an exported graph")
    return split(x, [size // count] * count, dim)


def sliced(x: Symbol, axis: int, start: Size, stop: Size) -> Symbol:
    """A range along an axis."""
    size = stop - start if isinstance(stop, Dim) else (stop + start * -1)
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    if size == x.shape[axis]:
        return x
    graph = x.graph
    if x.parts is not None and axis == x.dim() - 1 and isinstance(start, int) and isinstance(stop, int):
        return x.parts(start, stop)
    if x.known is not None and x.known.shape[axis] == 1:
        return repeated(x, shape)
    if x.known is not None and isinstance(start, int) and isinstance(stop, int):
        return repeated(graph.constant(x.known.narrow(axis, start, stop - start)), shape)
    numbers = [graph.sizes([start]), graph.sizes([stop]), graph.sizes([axis])]
    return graph.node("Slice", [x, *numbers], shape, x.dtype)  # type: ignore[no-any-return]


@becomes(torch.Tensor.__getitem__, method="getitem")
def getitem(x: Symbol, index: Any) -> Symbol:
    """Ranges, single places, new axes."""
    keys, axis = index if isinstance(index, tuple) else (index,), 0
    new_shape: list[Size] = []
    for key in keys:
        if key is None:
            new_shape.append(1)
            continue
        size = x.shape[axis]
        if isinstance(key, slice):
            if key.step is not None:
                raise PlanError("slices with a step have no counterpart in exported graphs")
            x = sliced(x, axis, _bound(key.start, size, 0), _bound(key.stop, size, size))
            new_shape.append(x.shape[axis])
        elif isinstance(key, int):
            at = key if key >= 0 else size + key
            x = sliced(x, axis, at, at + 1)
        else:
            raise PlanError(f"an index that is a {type(key).__name__} has no counterpart in exported graphs")
        axis += 1
    return reshape(x, *new_shape, *x.shape[axis:])


def _bound(given: Any, size: Size, usual: Size) -> Size:
    if given is None:
        return usual
    if isinstance(given, int) and given < 0:
        return size + given
    return min(given, size) if isinstance(given, int) and isinstance(size, int) else given


@becomes(torch.Tensor.expand, method="expand")
def expand(x: Symbol, *sizes: Any) -> Symbol:
    """Repetition along axes of size 1."""
    new = x.dim() - len(sizes)
    shape = tuple(x.shape[i + new] if size == -1 else size for i, size in enumerate(sizes))
    if shape == x.shape:
        return x
    if x.known is not None:
        return repeated(x, shape)
    return x.graph.node("Expand", [x, x.graph.sizes(shape)], shape, x.dtype)  # type: ignore[no-any-return]


@becomes(torch.Tensor.flip, method="flip")
def flip(x: Symbol, dim: int) -> Symbol:
    """Backwards along an axis whose size is known."""
    count = operator.index(x.shape[dim])  # type: ignore[arg-type]
    order = x.graph.constant(torch.arange(count - 1, -1, -1))
    return x.graph.node("Gather", [x, order], x.shape, x.dtype, axis=dim)  # type: ignore[no-any-return]
