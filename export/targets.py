"""Who is to run an exported graph, and which operators it keeps whole for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff.errors import PlanError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GROUP_NORMALIZATION, ATTENTION = 21, 23  # the opsets that brought these operators (the first in its present form)
NEWEST, OLDEST = 23, 18
BFLOAT16 = 22  # the opset from which convolutions take this type


class Target(NamedTuple):
    """A runtime, as far as graphs care."""

    name: str
    opset: int
    group_norm: bool  # keep ``GroupNormalization`` whole
    attention: bool  # keep ``Attention`` whole
    own: bool = False  # use operators of onnxruntime's own (``com.microsoft``)


# name -> the opset, and what is kept whole: what it has an implementation of its own for. onnxruntime would take
# ``GroupNormalization`` apart itself, and computes ``Attention`` through all its logits; its own operator does not.
_KNOWN = {
    "onnxruntime": (21, False, False, True),
    "tensorrt": (22, True, False, False),
    "tensorrt-rtx": (23, True, True, False),
    "onnx": (21, False, False, False),  # nothing but common operators, for any other runtime
}
TARGETS = tuple(_KNOWN)


def target_of(name: str, opset: int | None = None, dtype: torch.dtype = torch.float32) -> Target:
    """The target by name, with the opset that suits it and the type unless one is given.

    Raises:
        PlanError: if there is no such target or type, or the opset is out of range.
    """
    if dtype not in DTYPES.values():
        raise PlanError(f"dtype is {dtype}; allowed: {', '.join(DTYPES)}")
    if name not in _KNOWN:
        raise PlanError(f"target is {name!r}; allowed: {', '.join(_KNOWN)}")
    usual, group_norm, attention, own = _KNOWN[name]
    oldest = BFLOAT16 if dtype == torch.bfloat16 else OLDEST
    chosen = max(usual, oldest) if opset is None else opset
    if not oldest <= chosen <= NEWEST:
        raise PlanError(f"opset is {chosen}; allowed for {dtype}: {oldest} to {NEWEST}")
    return Target(name, chosen, group_norm and chosen >= GROUP_NORMALIZATION, attention and chosen >= ATTENTION, own)
