"""What torch's functions become in a graph: arithmetic, shapes and comparisons. Networks' own layers: ``layers.py``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.export.dims import Dim, Shape, Size, product, quotient
from fastdiff.export.symbol import Symbol, becomes

Value = Symbol | Tensor | float | int | bool


# --- types and constants ----------------------------------------------------------------------------------------------


def graph_of(*values: Any) -> Any:
    """The graph that some values belong to."""
    return next(value.graph for value in values if isinstance(value, Symbol))


def together(*values: Value) -> list[Symbol]:
    """The values as torch would take them together: of one type, numbers and tensors as constants."""
    graph = graph_of(*values)
    stand_ins = [
        torch.empty([1] * value.dim(), dtype=value.dtype) if isinstance(value, Symbol) else value for value in values
    ]
    dtype = torch.result_type(stand_ins[0], stand_ins[1])
    for stand_in in stand_ins[2:]:
        dtype = torch.result_type(torch.empty([1], dtype=dtype), stand_in)
    return [as_symbol(graph, value, dtype) for value in values]


def as_symbol(graph: Any, value: Value, dtype: torch.dtype) -> Symbol:
    """A value of this type in the graph."""
    if isinstance(value, Symbol):
        return cast(value, dtype)
    return graph.constant(torch.as_tensor(value).to(dtype))  # type: ignore[no-any-return]


@becomes(torch.Tensor.to, method="to")
def cast(x: Symbol, *args: Any, **_: Any) -> Symbol:
    """Another type; places and layouts mean nothing here."""
    dtype = next((a for a in (*args, _.get("dtype")) if isinstance(a, torch.dtype)), None)
    if dtype is None or dtype == x.dtype:
        return x
    if x.weight is not None:
        known = None if x.known is None else x.known.to(dtype)
        if known is not None:
            return repeated(x.graph.constant(known), x.shape)
    key = ("cast", x.name, dtype)
    made = x.graph._made.get(key)
    if made is None:
        made = x.graph.node("Cast", [x], x.shape, dtype, to=x.graph.onnx_type(dtype)).name
        x.graph._made[key] = made
    return Symbol(x.graph, made, x.shape, dtype)


@becomes(method="float")
def to_float32(x: Symbol) -> Symbol:
    """``x.float()``."""
    return cast(x, torch.float32)


@becomes(method="long")
def to_int64(x: Symbol) -> Symbol:
    """``x.long()``."""
    return cast(x, torch.int64)


@becomes(method="contiguous")
def contiguous(x: Symbol, **_: Any) -> Symbol:
    """Layouts mean nothing here."""
    return x


def repeated(x: Symbol, shape: Shape) -> Symbol:
    """A constant that is the same along axes of size 1, under the shape that it stands for."""
    return Symbol(x.graph, x.name, shape, x.dtype, x.weight, x.known)


def filled(like: Symbol, number: float, dtype: torch.dtype | None = None) -> Symbol:
    """One number in the shape of another value."""
    tensor = torch.full([1] * like.dim(), number, dtype=dtype or like.dtype)
    return repeated(like.graph.constant(tensor), like.shape)


@becomes(torch.zeros_like)
def zeros_like(x: Symbol, **_: Any) -> Symbol:
    """Zeros in the shape of ``x``."""
    return filled(x, 0)


@becomes(torch.full_like)
def full_like(x: Symbol, number: float, **_: Any) -> Symbol:
    """One number in the shape of ``x``."""
    return filled(x, number)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def joint_shape(*shapes: Shape) -> Shape:
    """The shape of a result to which these are broadcast."""
    result: list[Size] = []
    for sizes in zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1):
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            raise PlanError(f"shapes {', '.join(_shown(shape) for shape in shapes)} do not fit one another")
        result.append(wide.pop() if wide else 1)
    return tuple(result[::-1])


def _shown(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


_FOLDED = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Max": torch.maximum, "Min": torch.minimum,
    "Equal": torch.eq,
}  # fmt: skip


def binary(op: str, left: Value, right: Value, dtype: torch.dtype | None = None) -> Symbol:
    """A node of two values, or its result if both are known."""
    a, b = together(left, right)
    shape = joint_shape(a.shape, b.shape)
    if a.known is not None and b.known is not None:
        return repeated(a.graph.constant(_FOLDED[op](a.known, b.known)), shape)
    for one, other in ((a, b), (b, a)):  # what changes nothing
        plain = one.known is not None and one.known.numel() == 1 and other.shape == shape
        if plain and (op == "Mul" and bool(one.known == 1) or op == "Add" and bool(one.known == 0)):
            return other
    return a.graph.node(op, [a, b], shape, dtype or a.dtype)  # type: ignore[no-any-return]


def _binary(op: str, method: str, *functions: Any, dtype: torch.dtype | None = None) -> None:
    @becomes(*functions, method=method)
    def handler(left: Value, right: Value) -> Symbol:
        return binary(op, left, right, dtype)


_binary("Add", "add", torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
_binary("Sub", "sub", torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
_binary("Mul", "mul", torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_binary("Div", "div", torch.div, torch.Tensor.div, torch.Tensor.__truediv__)
_binary("Max", "maximum", torch.maximum)
_binary("Min", "minimum", torch.minimum)
_binary("Equal", "eq", torch.eq, torch.Tensor.__eq__, dtype=torch.bool)


@becomes(torch.Tensor.__rsub__)
def reversed_sub(x: Value, other: Value) -> Symbol:
    """``other - x``."""
    return binary("Sub", other, x)


@becomes(torch.Tensor.__ne__, method="ne")
def not_equal(left: Value, right: Value) -> Symbol:
    """``left != right``."""
    same = binary("Equal", left, right, torch.bool)
    return same.graph.node("Not", [same], same.shape, torch.bool)  # type: ignore[no-any-return]


@becomes(torch.where)
def where(condition: Symbol | Tensor, yes: Value, no: Value) -> Symbol:
    """Element by element, one or the other."""
    if isinstance(condition, Tensor):
        if condition.numel() != 1:
            raise PlanError("torch.where on a tensor that is known has no counterpart in exported graphs")
        chosen = yes if bool(condition) else no
        both = together(yes, no)
        return both[0] if chosen is yes else both[1]
    graph = condition.graph
    if not isinstance(yes, Symbol) and not isinstance(no, Symbol):
        yes = as_symbol(graph, yes, torch.result_type(torch.as_tensor(yes), torch.as_tensor(no)))
    a, b = together(yes, no)
    shape = joint_shape(condition.shape, a.shape, b.shape)
    return graph.node("Where", [condition, a, b], shape, a.dtype)  # type: ignore[no-any-return]


@becomes(torch.lerp)
def lerp(start: Symbol, end: Symbol, weight: Value) -> Symbol:
    """``start + weight * (end - start)``."""
    return start + (end - start) * weight  # type: ignore[no-any-return]


def _unary(op: str, method: str, *functions: Any) -> None:
    @becomes(*functions, method=method)
    def handler(x: Symbol, *_: Any, **__: Any) -> Symbol:
        return x.graph.node(op, [x], x.shape, x.dtype)  # type: ignore[no-any-return]


_unary("Exp", "exp", torch.exp, torch.Tensor.exp)
_unary("Sin", "sin", torch.sin)
_unary("Cos", "cos", torch.cos)
_unary("Tanh", "tanh", torch.tanh)
_unary("Neg", "neg", torch.neg, torch.Tensor.neg, torch.Tensor.__neg__)
_unary("Sqrt", "sqrt", torch.sqrt)
_unary("Sigmoid", "sigmoid", torch.sigmoid)
_unary("Abs", "abs", torch.abs, torch.Tensor.abs)


@becomes(torch.square, method="square")
def square(x: Symbol) -> Symbol:
    """``x * x``."""
    return binary("Mul", x, x)


@becomes(torch.clamp, method="clamp")
def clamp(x: Symbol, least: float | None = None, most: float | None = None) -> Symbol:
    """Bounds; None is none."""
    bounds = ["" if bound is None else as_symbol(x.graph, bound, x.dtype) for bound in (least, most)]
    scalars = [bound if isinstance(bound, str) else x.graph.named(bound) for bound in bounds]
    return x.graph.node("Clip", [x, *scalars], x.shape, x.dtype)  # type: ignore[no-any-return]


@becomes(torch.clamp_min, method="clamp_min")
def clamp_min(x: Symbol, least: float) -> Symbol:
    """A lower bound."""
    return clamp(x, least)


@becomes(torch.clamp_max, method="clamp_max")
def clamp_max(x: Symbol, most: float) -> Symbol:
    """An upper bound."""
    return clamp(x, None, most)


# --- sums over axes ---------------------------------------------------------------------------------------------------


def reduced(op: str, x: Symbol, axes: Sequence[int]) -> Symbol:
    """A reduction that keeps its axes, as 1."""
    at = {axis % x.dim() for axis in axes}
    shape = tuple(1 if i in at else size for i, size in enumerate(x.shape))
    given = x.graph.constant(torch.tensor(sorted(at), dtype=torch.int64))
    return x.graph.node(op, [x, given], shape, x.dtype, keepdims=1)  # type: ignore[no-any-return]


def _kept(keepdim: bool) -> None:
    if not keepdim:
        raise PlanError("sums that drop their axes have no counterpart in exported graphs")


@becomes(torch.sum, method="sum")
def total(x: Symbol, dim: Sequence[int], keepdim: bool = False) -> Symbol:
    """A sum over axes."""
    _kept(keepdim)
    return reduced("ReduceSum", x, dim)


@becomes(torch.std, method="std")
def deviation(x: Symbol, dim: Sequence[int], *, correction: int = 0, keepdim: bool = False) -> Symbol:
    """The standard deviation over axes, by the mean of squares around the mean."""
    _kept(keepdim)
    if correction:
        raise PlanError(f"torch.std with correction {correction} has no counterpart in exported graphs; allowed: 0")
    centred = x - reduced("ReduceMean", x, dim)
    variance = reduced("ReduceMean", centred * centred, dim)
    return variance.graph.node("Sqrt", [variance], variance.shape, x.dtype)  # type: ignore[no-any-return]


@becomes(torch.linalg.vector_norm)
def vector_norm(x: Symbol, *, dim: Sequence[int], keepdim: bool = False) -> Symbol:
    """The Euclidean length over axes."""
    _kept(keepdim)
    return reduced("ReduceL2", x, dim)


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


# --- shapes -----------------------------------------------------------------------------------------------------------


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
        raise PlanError(f"a size of {_shown(old)} in place of -1 in {_shown(tuple(new))} is not known")
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


@becomes(torch.Tensor.repeat_interleave, method="repeat_interleave")
def repeat_interleave(x: Symbol, count: int, dim: int = 0) -> Symbol:
    """Each row of the first axis ``count`` times."""
    if dim != 0:
        raise PlanError(f"repeat_interleave along axis {dim} has no counterpart in exported graphs")
    if count == 1:
        return x
    wide = expand(getitem(x, (slice(None), None)), x.shape[0], count, *x.shape[1:])
    return reshape(wide, x.shape[0] * count, *x.shape[1:])


@becomes(torch.unbind, torch.Tensor.unbind, method="unbind")
def unbind(x: Symbol, dim: int = 0) -> list[Symbol]:
    """Each place along an axis."""
    count = operator.index(x.shape[dim])  # type: ignore[arg-type]
    return [getitem(x, (*[slice(None)] * dim, i)) for i in range(count)]


@becomes(torch.Tensor.flip, method="flip")
def flip(x: Symbol, dim: int) -> Symbol:
    """Backwards along an axis whose size is known."""
    count = operator.index(x.shape[dim])  # type: ignore[arg-type]
    order = x.graph.constant(torch.arange(count - 1, -1, -1))
    return x.graph.node("Gather", [x, order], x.shape, x.dtype, axis=dim)  # type: ignore[no-any-return]
