"""Times of what there is to choose from, measured once on a machine and kept on disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastdiff.kernels.native import cache_folder

Times = dict[str, dict[str, float]]  # what is to be done -> name of a way to do it -> seconds


def table_file(*key: object) -> Path:
    """Where the times are kept that hold for all of ``key``: the hardware, the code, how many threads...

    Raises:
        Unavailable: if there is no cache folder.
    """
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).hexdigest()[:16]
    return cache_folder() / f"times-{digest}.json"


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


def add_times(file: Path, new: Mapping[str, Mapping[str, float]]) -> Times:
    """Add times to a file. Others may write at the same time, or be killed: the file is always whole.

    Where nothing can be written (a full or read-only disk) nothing is kept, and the next process measures again.

    Returns:
        All times that hold now. Of two processes that measured the same, whoever wrote first is believed by both: they
        choose alike, and so draw the same bits.
    """
    merged = {name: dict(each) for name, each in new.items()}
    with contextlib.suppress(OSError), _locked(file):
        for name, each in read_times(file).items():
            merged[name] = merged.get(name, {}) | each
        handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(merged, out, indent=1, sort_keys=True)
            os.replace(scratch, file)
        except BaseException:
            os.unlink(scratch)
            raise
    return merged


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield
