"""Kernels of the hot loop. ``REFERENCE`` is plain torch, ``CPU`` what is faster there; ``triton_ops()``: fused twins.

Ops are handed to whoever uses them (the UNet, the loop); nothing is patched and nothing is chosen at import.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, reference
from .sums import Sums


class Ops(NamedTuple):
    """One implementation of each op. The signatures are those of ``fastdiff.kernels.reference``."""

    group_norm_silu: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    combine: Callable[..., tuple[Tensor, ...]]
    linear: Callable[..., Tensor] = reference.linear
    upsample_conv: Callable[..., Tensor] = reference.upsample_conv
    layer_norm: Callable[..., Tensor] = reference.layer_norm
    geglu: Callable[..., Tensor] = reference.geglu
    add: Callable[..., Tensor] = reference.add


REFERENCE = Ops(reference.group_norm_silu, reference.attention, reference.combine)
CPU = REFERENCE._replace(linear=cpu.linear, upsample_conv=cpu.upsample_conv)


def triton_ops() -> Ops:
    """Return the Triton ops. Imports triton here and nowhere else.

    Raises:
        ImportError: if triton is not installed (``pip install 'fastdiff[gpu]'``).
    """
    from .add import add
    from .combine import combine
    from .dispatch import attention
    from .geglu import geglu
    from .group_norm_silu import group_norm_silu
    from .layer_norm import layer_norm

    return Ops(group_norm_silu, attention, combine, layer_norm=layer_norm, geglu=geglu, add=add)


def in_turn(ops: Ops, device: torch.device) -> Ops:
    """The same ops for calls that run one after another, never at once: they share memory, so each is one launch."""
    if ops.group_norm_silu is REFERENCE.group_norm_silu or device.type != "cuda":
        return ops
    from .group_norm_silu import Workspace

    shared = partial(ops.group_norm_silu, workspace=Workspace.on(device))
    return ops._replace(group_norm_silu=shared)


__all__ = ["CPU", "REFERENCE", "Ops", "Sums", "in_turn", "triton_ops"]
