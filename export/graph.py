"""An ONNX graph under construction: nodes in the order in which they were made, weights that are read when written.

Names come from where in the network a value is made and from counting, so that the same network gives the same graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from fastdiff.export.dims import Dim, Shape, Size
from fastdiff.export.symbol import Symbol
from fastdiff.export.targets import Target

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
OWN = "com.microsoft"  # the domain of onnxruntime's own operators
BROADCAST = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Where", "Expand"}
# how a weight of the file is named that is not held as the model holds it
SWAPPED, COLUMN, CORNER = "::T", "::column", "::corner"


def halves(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three weights along an axis, summed to two: for even pixels of a doubled image, and for odd ones."""
    first, middle, last = kernel.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row by row; a view where they lie so."""
    flat = tensor.contiguous().view(-1)
    if flat.stride() != (1,):  # one number may have any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy())


@dataclass(frozen=True)
class Weight:
    """Numbers of a graph: a tensor of the model as it lies in memory, and what becomes of it when it is written."""

    name: str
    source: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]  # in the file: that of ``source``, or with its axes swapped or joined
    swapped: bool = False  # a matrix whose axes are swapped
    corner: tuple[int, int] | None = None  # a 3x3 kernel as the 2x2 one of these pixels of a doubled image

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * torch.empty((), dtype=self.dtype).itemsize

    def data(self) -> memoryview:
        """The bytes, little-endian; a view where nothing has to be changed."""
        found = self.source.detach()
        if self.swapped:
            found = found.flatten(1).t()
        if self.corner is not None:
            for axis, place in zip((2, 3), self.corner, strict=True):
                found = halves(found.double(), axis)[place]
        return raw(found.to("cpu", self.dtype))


class Graph:
    """Nodes, weights, inputs and outputs.

    Args:
        name: of the graph.
        target: who is to run it.
    """

    def __init__(self, name: str, target: Target):
        self.name, self.target = name, target
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self.types: dict[str, tuple[torch.dtype, Shape]] = {}  # of every value a node makes or the caller gives
        self.inputs: dict[str, Symbol] = {}
        self.outputs: dict[str, Symbol] = {}
        self.layers: dict[str, str] = {}  # module -> the value that it gave
        self.adapters: dict[
            str, tuple[Symbol, Symbol]
        ] = {}  # weight -> its low-rank factors, where the caller gives them
        self.wide: set[str] = set()  # layers that compute in float32 whatever the rest does
        self._scope: list[str] = []
        self._count: Counter[str] = Counter()
        self._homes: dict[Dim, tuple[str, int]] = {}  # a value with that size, and at which axis
        self._made: dict[Any, str] = {}  # constants, shapes and casts that are there already

    # --- values -----------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[Size], dtype: torch.dtype) -> Symbol:
        """Declare what the caller gives."""
        value = Symbol(self, name, tuple(shape), dtype)
        self.inputs[name] = value
        self._remember(value)
        return value

    def drop_unread(self, names: Collection[str]) -> None:
        """Take back those of these inputs that no node reads."""
        read = {name for node in self._needed() for name in node.input}
        self.inputs = {name: value for name, value in self.inputs.items() if name in read or name not in names}

    def output(self, name: str, value: Symbol) -> None:
        """Declare what the caller gets."""
        made = self.node("Identity", [value], value.shape, value.dtype, output=name)
        self.outputs[name] = made

    def node(
        self,
        op: str,
        inputs: Sequence[Symbol | str],
        shape: Sequence[Size],
        dtype: torch.dtype,
        *,
        output: str | None = None,
        others: int = 0,
        **attributes: Any,
    ) -> Symbol:
        """Add a node and return its first output; an empty name among the inputs leaves an optional one out.

        ``others``: outputs that it has besides, which nobody reads.
        """
        label = self.unique(op)
        names = [value if isinstance(value, str) else self.named(value, op in BROADCAST) for value in inputs]
        made = Symbol(self, output or label, tuple(shape), dtype)
        unread = [f"{label}/{i + 1}" for i in range(others)]
        self.nodes.append(helper.make_node(op, names, [made.name, *unread], name=label, **attributes))
        self._remember(made)
        return made

    def unique(self, what: str) -> str:
        """A name that says where we are."""
        base = "/".join([*self._scope[-1:], what])
        self._count[base] += 1
        return f"{base}_{self._count[base]}"

    def named(self, value: Symbol, repeats: bool = False) -> str:
        """The name under which a node reads a value; weights and constants join the graph when they are first read.

        ``repeats``: the node itself repeats what has size 1.
        """
        weight = value.weight
        if weight is None:
            return value.name
        if not repeats and weight.shape != value.shape:
            key = ("whole", weight.name, value.shape)
            if key not in self._made:
                held = Symbol(self, weight.name, weight.shape, value.dtype, weight)
                self._made[key] = self.node("Expand", [held, self.sizes(value.shape)], value.shape, value.dtype).name
            return self._made[key]
        if weight.name not in self.weights:
            self.weights[weight.name] = weight
        return weight.name

    def _remember(self, value: Symbol) -> None:
        self.types[value.name] = value.dtype, value.shape
        for axis, size in enumerate(value.shape):
            if isinstance(size, Dim):
                self._homes.setdefault(size, (value.name, axis))

    def weight(
        self, name: str, source: Tensor, dtype: torch.dtype, shape: Sequence[Size], swapped: bool = False
    ) -> Symbol:
        """A parameter, as the file will hold it: of this type and shape, or a matrix with its axes swapped."""
        held = f"{name}{SWAPPED}" if swapped else name
        weight = Weight(held, source, dtype, tuple(int(size) for size in shape), swapped)  # type: ignore[arg-type]
        return Symbol(self, held, tuple(shape), dtype, weight)

    def column(self, vector: Symbol) -> Symbol:
        """A weight ``[C]`` as ``[C, 1, 1]``, to multiply images."""
        weight = vector.weight
        held = Weight(f"{weight.name}{COLUMN}", weight.source, weight.dtype, (*weight.shape, 1, 1))
        return Symbol(self, held.name, held.shape, held.dtype, held)

    def corner(self, kernel: Symbol, place: tuple[int, int]) -> Symbol:
        """A kernel ``[C', C, 3, 3]`` as the ``[C', C, 2, 2]`` that makes the pixels at ``place`` of a doubled image."""
        weight, shape = kernel.weight, (*kernel.weight.shape[:2], 2, 2)
        held = Weight(f"{weight.name}{CORNER}{place[0]}{place[1]}", weight.source, weight.dtype, shape, corner=place)
        return Symbol(self, held.name, shape, held.dtype, held)

    def part(self, value: Symbol, start: int, stop: int) -> Symbol:
        """Some of the first axis of a weight, as a weight."""
        weight = value.weight
        return self.weight(
            f"{weight.name}[{start}:{stop}]", weight.source[start:stop], value.dtype, (stop - start, *value.shape[1:])
        )

    @staticmethod
    def onnx_type(dtype: torch.dtype) -> int:
        """ONNX's number for a type."""
        return ONNX_TYPES[dtype]

    def constant(self, tensor: Tensor) -> Symbol:
        """A value that is known now."""
        flat = tensor.detach().cpu()
        key = (flat.dtype, tuple(flat.shape), raw(flat).tobytes())
        if key not in self._made:
            self._made[key] = f"constant_{sum(1 for k in self._made if len(k) == 3) + 1}"
        weight = Weight(self._made[key], flat, flat.dtype, tuple(flat.shape))
        return Symbol(self, weight.name, tuple(flat.shape), flat.dtype, weight, flat)

    def sizes(self, shape: Sequence[Size]) -> Symbol:
        """A shape as a value, ``[rank]`` int64; what is not known now is read from a value that has that size."""
        key = ("sizes", tuple(shape))
        if all(isinstance(size, int) for size in shape):
            return self.constant(torch.tensor(list(shape), dtype=torch.int64))
        if key not in self._made:
            parts = [self._size(size) for size in shape]
            value = parts[0] if len(parts) == 1 else self.node("Concat", parts, (len(parts),), torch.int64, axis=0)
            self._made[key] = value.name
        return Symbol(self, self._made[key], (len(shape),), torch.int64)

    def _size(self, size: Size) -> Symbol:
        if isinstance(size, int):
            return self.constant(torch.tensor([size], dtype=torch.int64))
        key = ("size", size)
        if key not in self._made:
            name, axis = self._homes[size]
            self._made[key] = self.node("Shape", [name], (1,), torch.int64, start=axis, end=axis + 1).name
        return Symbol(self, self._made[key], (1,), torch.int64)

    # --- where we are -----------------------------------------------------------------------------------------------

    @property
    def here(self) -> str:
        """The layer that we are in."""
        return self._scope[-1] if self._scope else ""

    def enter(self, name: str) -> None:
        """Enter a layer; ``leave`` ends it."""
        self._scope.append(name)

    def leave(self) -> None:
        """See ``enter``."""
        self._scope.pop()

    # --- the result -------------------------------------------------------------------------------------------------

    def proto(self, initializers: Sequence[TensorProto], facts: Mapping[str, str]) -> onnx.ModelProto:
        """The model, without what no output needs."""
        nodes = self._needed()
        names = {name for node in nodes for name in node.output}
        body = helper.make_graph(
            nodes,
            self.name,
            [self._info(name) for name in self.inputs],
            [self._info(name) for name in self.outputs],
            list(initializers),
            value_info=[self._info(name) for name in self.types if name in names and name not in self.outputs],
        )
        opset = [helper.make_opsetid("", self.target.opset)]
        version = helper.find_min_ir_version_for(opset)
        if any(node.domain == OWN for node in nodes):
            opset.append(helper.make_opsetid(OWN, 1))
        model = helper.make_model(body, opset_imports=opset, ir_version=version, producer_name="fastdiff")
        helper.set_model_props(model, dict(facts))
        return model

    def _needed(self) -> list[onnx.NodeProto]:
        wanted, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]

    def needed_weights(self) -> list[Weight]:
        """The weights that the outputs need, in the order in which they are first read."""
        read = {name for node in self._needed() for name in node.input}
        return [weight for name, weight in self.weights.items() if name in read]

    def layer_values(self) -> dict[str, str]:
        """Which value each layer gave, of those that the file holds."""
        made = {name for node in self._needed() for name in node.output}
        return {layer: value for layer, value in self.layers.items() if value in made}

    def _info(self, name: str) -> onnx.ValueInfoProto:
        dtype, shape = self.types[name]
        sizes = [size if isinstance(size, int) else str(size) for size in shape]
        return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], sizes)
