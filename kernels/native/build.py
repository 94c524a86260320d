"""Compiles the CPU plan's runtime with the compiler at hand, once, into a private cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = (
    "-O2", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


class Unavailable(Exception):
    """Why there is no native runtime here, in one line."""


def cache_folder() -> Path:
    """Where what was compiled and measured is kept: ``FASTDIFF_CACHE``, or ``fastdiff`` in the user's cache folder.

    Raises:
        Unavailable: if others could write there; what lies in it is loaded as code.
    """
    named = os.environ.get("FASTDIFF_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(base) / "fastdiff"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"the cache folder {folder} cannot be made: {error}") from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"others may write to the cache folder {folder}; set FASTDIFF_CACHE to one of your own")
    return folder


@functools.cache
def cpu_name() -> str:
    """The processor's model, for the keys of caches."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('model name', platform.machine())} family {found.get('cpu family')} model {found.get('model')}"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def source_hash() -> str:
    """A hash of the C++ sources and flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in sorted(SOURCES.glob("*.[hc]*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def compile_library() -> Path:
    """Return the compiled runtime, from the cache if it is there.

    Raises:
        Unavailable: no x86-64 Linux with AVX2, no g++, or it failed.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not {"avx2", "fma"} <= cpu_flags():
        raise Unavailable("the native runtime needs Linux on x86-64 with AVX2 and FMA")
    folder = cache_folder()
    # the code is made for this very processor: a cache that moves to another machine must not be used there
    key = hashlib.sha256(f"{source_hash()} {cpu_name()} {sorted(cpu_flags())}".encode()).hexdigest()[:16]
    library = folder / f"native-{key}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("the native runtime needs a C++ compiler: install g++, or set CXX")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        done = subprocess.run(
            [compiler, *FLAGS, str(SOURCES / "plan.cpp"), "-o", str(made)], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise Unavailable(f"{compiler} failed on the native runtime: {reason}")
        os.replace(made, library)  # complete or not there, whoever else is writing it
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Compile if need be, and load. torch comes first: both then share its OpenMP threads.

    Raises:
        Unavailable: see ``compile_library``; or the file does not load.
    """
    import torch  # noqa: F401

    try:
        return ctypes.CDLL(str(compile_library()))
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the native runtime does not load: {error}") from error
