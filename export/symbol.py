"""A value of a graph that behaves as a tensor does: torch's functions, called with it, add nodes instead of computing.

This is torch's own protocol (``__torch_function__``), so networks, guidance and the loop are exported by running
them; no second description of them exists. What a function becomes is in ``operators.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.export.dims import Shape, Size

Handler = Callable[..., Any]
FUNCTIONS: dict[Any, Handler] = {}  # torch's function -> what it becomes
METHODS: dict[str, Handler] = {}  # the same for methods of a tensor, by name


def becomes(*functions: Any, method: str | None = None) -> Callable[[Handler], Handler]:
    """Register what torch's functions, and a method of a tensor, become."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            FUNCTIONS[function] = handler
        if method is not None:
            METHODS[method] = handler
        return handler

    return register


class Symbol:
    """A tensor to be.

    Args:
        graph: that it belongs to.
        name: of the value.
        shape: numbers, and ``Dim`` where a size is known only when the graph runs.
        dtype: of torch.
        weight: what is written for it, if it is a weight or a constant.
        known: its numbers, if they are known now. They may have 1 where ``shape`` has more: they repeat there.
    """

    device = torch.device("cpu")
    is_meta = False

    def __init__(
        self, graph: Any, name: str, shape: Shape, dtype: torch.dtype, weight: Any = None, known: Tensor | None = None
    ):
        self.graph, self.name, self.shape, self.dtype, self.weight, self.known = (
            graph,
            name,
            shape,
            dtype,
            weight,
            known,
        )
        self.moved: tuple[Symbol, tuple[int, ...]] | None = None  # of which value it is a transposition, and how
        self.folded: Symbol | None = None  # which value it is with other sizes
        self.parts: Callable[[int, int], Symbol] | None = None  # makes a range of its last axis, cheaper than cutting

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch's protocol."""
        handler = FUNCTIONS.get(func)
        if handler is None:
            raise PlanError(f"torch's {getattr(func, '__name__', func)} has no counterpart in exported graphs")
        return handler(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(f"an exported value has no {name}")
        return lambda *args, **kwargs: METHODS[name](self, *args, **kwargs)

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> Shape | Size:
        """The shape, or one of its numbers."""
        return self.shape if axis is None else self.shape[axis]

    def is_floating_point(self) -> bool:
        """Is it of a float type?"""
        return self.dtype.is_floating_point

    def __iter__(self) -> Iterator[Any]:
        count = self.shape[0]
        if not isinstance(count, int):
            raise PlanError(f"a size that is known only when the graph runs ({count}) cannot be walked along")
        return (self[i] for i in range(count))

    def __getitem__(self, index: Any) -> Any:
        return METHODS["getitem"](self, index)

    def __add__(self, other: Any) -> Any:
        return METHODS["add"](self, other)

    def __radd__(self, other: Any) -> Any:
        return METHODS["add"](other, self)

    def __sub__(self, other: Any) -> Any:
        return METHODS["sub"](self, other)

    def __rsub__(self, other: Any) -> Any:
        return METHODS["sub"](other, self)

    def __mul__(self, other: Any) -> Any:
        return METHODS["mul"](self, other)

    def __rmul__(self, other: Any) -> Any:
        return METHODS["mul"](other, self)

    def __truediv__(self, other: Any) -> Any:
        return METHODS["div"](self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return METHODS["div"](other, self)

    def __neg__(self) -> Any:
        return METHODS["neg"](self)

    def __eq__(self, other: Any) -> Any:
        return METHODS["eq"](self, other)

    def __ne__(self, other: Any) -> Any:
        return METHODS["ne"](self, other)

    __hash__ = object.__hash__
