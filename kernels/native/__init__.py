"""The CPU runtime: a plan of fused channels-last ops, run by one call. The sources are the C++ files beside it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import Unavailable, cache_folder, cpu_flags, cpu_name, load, source_hash

CONV, NORM, LAYER_NORM, ATTENTION, RESAMPLE, ADD = range(6)
KINDS = ("conv", "norm", "layer_norm", "attention", "resample", "add")
HUGE, MADV_HUGEPAGE = 2 << 20, 14  # bytes; of Linux
SLOTS = ("src0", "src1", "weight", "bias", "stats", "row", "residual", "out")
_INTS = (
    "kind algorithm packed B H W VIEW_H VIEW_W SH SW C0 C1 N ld0 ld1 ldo ldr kernel stride pad silu gated affine "
    "row_stride groups heads L M ldk head_k batch_k"
).split()


class Op(ctypes.Structure):
    """One step of a plan: ``op.h``. Every slot is -1, that is none, until it is set."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _INTS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in SLOTS),
    ]

    def __init__(self, **values: Any):
        super().__init__(**({name: -1 for name in SLOTS} | values))


class Runtime:
    """The compiled library's functions.

    Raises:
        Unavailable: if it cannot be had here.
    """

    def __init__(self) -> None:
        library = load()
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.fastdiff_scratch.argtypes = [pointer, number, number]
        library.fastdiff_scratch.restype = ctypes.c_int64
        library.fastdiff_run.argtypes = [pointer, number, pointer, pointer, number, pointer]
        library.fastdiff_packed_floats.argtypes = [pointer]
        library.fastdiff_packed_floats.restype = ctypes.c_int64
        library.fastdiff_pack.argtypes = [pointer, pointer, pointer, number]
        if library.fastdiff_op_bytes() != ctypes.sizeof(Op):
            raise Unavailable("the native runtime's ops have another size than Python's")
        self.library, self.width = library, library.fastdiff_width()
        self.run = library.fastdiff_run

    def scratch(self, ops: Sequence[Op], threads: int) -> Tensor:
        """Scratch that suffices for any of ``ops``: float32, aligned to 64 bytes."""
        array = (Op * len(ops))(*ops)
        floats = self.library.fastdiff_scratch(ctypes.addressof(array), len(ops), threads) // 4
        return aligned(floats)

    def packed_floats(self, op: Op) -> int:
        """The size of an op's weights in its algorithm's own layout."""
        return int(self.library.fastdiff_packed_floats(ctypes.addressof(op)))

    def pack(self, op: Op, weight: Tensor, threads: int) -> Tensor:
        """``weight [N, K]``, K ordered as (row, column, channel), in the layout of the op's algorithm."""
        out = aligned(self.packed_floats(op))
        self.library.fastdiff_pack(ctypes.addressof(op), weight.data_ptr(), out.data_ptr(), threads)
        return out


def aligned(floats: int) -> Tensor:
    """``[floats]`` float32, uninitialised, at a multiple of 64 bytes; a large one on huge pages if the system has them.

    A plan walks through many rows at once, and each walk through a table of small pages costs more than the row.
    """
    page = HUGE if 4 * floats >= HUGE else 64
    whole = torch.empty(floats + page // 4)
    skip = -whole.data_ptr() % page
    tensor = whole[skip // 4 : skip // 4 + floats]
    if page == HUGE:
        _libc().madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(4 * floats // HUGE * HUGE), MADV_HUGEPAGE)
    return tensor


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


__all__ = [
    "ADD", "ATTENTION", "CONV", "KINDS", "LAYER_NORM", "NORM", "RESAMPLE", "SLOTS", "Op", "Runtime", "Unavailable",
    "aligned", "cache_folder", "cpu_flags", "cpu_name", "source_hash",
]  # fmt: skip
