"""Times of ops on this machine, measured once and kept on disk."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fastdiff.kernels.native import Op, Runtime, cache_folder, cpu_name, source_hash

Times = dict[str, dict[str, float]]  # signature -> name of the choice -> seconds
FLUSHED = 16 << 20  # floats: what the caches hold is gone after writing so many
ROUNDS, LONG = 7, 0.02  # a run that takes longer than this is timed only twice


def table_file(threads: int) -> Path:
    """Where the times of this processor, this code and so many threads are kept.

    Raises:
        Unavailable: if there is no cache folder.
    """
    key = hashlib.sha256(f"{cpu_name()} {source_hash()} {torch.__version__}".encode()).hexdigest()[:16]
    return cache_folder() / f"times-{key}-{threads}.json"


def read_times(file: Path) -> Times:
    """The times of a file; what is not there or is damaged counts as not measured."""
    try:
        found = json.loads(file.read_text())
        return {
            str(name): {str(k): float(v) for k, v in each.items() if 0 < float(v) < 3600}
            for name, each in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def add_times(file: Path, new: Mapping[str, Mapping[str, float]]) -> None:
    """Add times to a file. Others may write at the same time, or be killed: the file is always whole.

    Where nothing can be written (a full or read-only disk) nothing is kept, and the next process measures again.
    """
    with contextlib.suppress(OSError), _locked(file):
        merged = read_times(file)
        for name, each in new.items():
            merged.setdefault(name, {}).update(each)
        handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(merged, out, indent=1, sort_keys=True)
            os.replace(scratch, file)
        except BaseException:
            os.unlink(scratch)
            raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield


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
