"""How long an op takes on this machine."""

from __future__ import annotations

import ctypes
import time

import torch

from fastdiff.kernels.native import Op, Runtime

FLUSHED = 16 << 20  # floats: what the caches hold is gone after writing so many
ROUNDS, LONG = 7, 0.02  # a run that takes longer than this is timed only twice


def time_op(runtime: Runtime, op: Op, slots: ctypes.Array[ctypes.c_void_p], threads: int, patience: float) -> float:
    """The least seconds of one op over a few runs, each with cold caches; stops early past ``patience`` seconds."""
    scratch = runtime.scratch([op], threads)
    flush = torch.empty(FLUSHED)
    times: list[float] = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        flush.fill_(0.0)
        begin = time.perf_counter()
        runtime.run(ctypes.addressof(op), 1, slots, scratch.data_ptr(), threads, None)
        times.append(time.perf_counter() - begin)
        if times[-1] > patience or (len(times) > 2 and times[-1] > LONG):
            break
    return min(times[1:] or times)
