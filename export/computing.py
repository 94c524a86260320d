"""Running a network in another float type than its weights are held in, one layer's weights at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_ASKED = {Tensor.shape.__get__, Tensor.device.__get__, Tensor.is_meta.__get__, Tensor.dim, Tensor.size}  # type: ignore[attr-defined]


class Computing(TorchFunctionMode):
    """Weights are taken to be of ``dtype``; with float64 so is every float, whatever the network asks for.

    A converted copy of a large network would not fit beside it; here each layer's weights are converted when used.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.precise = dtype, dtype == torch.float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        if func in _ASKED:
            return func(*args, **(kwargs or {}))
        if func is _TYPE:
            return self.dtype if isinstance(args[0], nn.Parameter) else func(*args)
        if self.precise and func is Tensor.float:
            func = Tensor.double
        return func(*self._all(args), **{key: self._one(value) for key, value in (kwargs or {}).items()})

    def _all(self, values: Any) -> Any:
        return tuple(self._one(value) for value in values)

    def _one(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            ours = value.is_floating_point() and (self.precise or isinstance(value, nn.Parameter))
            return value.to(self.dtype) if ours else value
        if isinstance(value, torch.dtype):
            return torch.float64 if self.precise and value.is_floating_point else value
        if type(value) in (list, tuple):
            return type(value)(self._one(part) for part in value)
        return value
