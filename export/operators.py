"""What torch's functions become in a graph: arithmetic and comparisons; the rest is in ``shapes.py``, ``layers.py``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.export.dims import Shape, Size
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
            raise PlanError(f"shapes {', '.join(shown_shape(shape) for shape in shapes)} do not fit one another")
        result.append(wide.pop() if wide else 1)
    return tuple(result[::-1])


def shown_shape(shape: Shape) -> str:
    """A shape for a message."""
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
