"""The CPU runtime for tests. Only a machine that cannot have it skips: sources that do not compile are a failure."""

from __future__ import annotations

import os
import platform
import shutil

import pytest

from fastdiff.kernels.native import Runtime, cpu_flags


def runtime_or_skip() -> Runtime:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("the CPU runtime needs Linux on x86-64 with AVX2 and FMA")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the CPU runtime needs a C++ compiler, and none is here")
    return Runtime()
