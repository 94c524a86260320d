"""What a figure was measured on, and how the clock is read. Every benchmark uses these and no others."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.files import write_text

LIBRARIES = ("torch", "triton", "onnx", "onnxruntime", "openvino", "diffusers", "numpy", "fastdiff")
# What decides which code path a CPU library takes for convolutions and matrix products.
FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile",
    "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "sve", "i8mm", "bf16",
)  # fmt: skip
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a figure depends on beside the code: hardware, threads, versions, date. No host name, no path.

    Args:
        device: where the figures are measured; by default the GPU if there is one.
    """
    cpu, flags = _cpu()
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "flags": flags,
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return facts | (_gpu(device) if device.type == "cuda" else {})


def _cpu() -> tuple[str, list[str]]:
    """The CPU's model name and those of its flags that matter; outside Linux the name alone."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    source = Path("/proc/cpuinfo")
    if source.exists():
        for line in source.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):  # x86, Arm
                flags.update(value.split())
            elif not key and flags:
                break  # the other cores repeat the first
    return name, [flag for flag in FLAGS if flag in flags]


def _cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "gpu": {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(l2_bytes(device) / 2**20, 1),
        },
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "convolution": torch.backends.cudnn.allow_tf32,
        },
    }
    if shutil.which("nvidia-smi"):
        index = str(properties.uuid) if hasattr(properties, "uuid") else str(device.index or 0)
        facts["gpu"]["clocks"] = _clocks(f"GPU-{index}" if "-" in index else index)
    return facts


def _clocks(identity: str) -> dict[str, str]:
    """Clocks, power limit and driver as the driver's tool tells them; empty where it will not."""
    command = ["nvidia-smi", "-i", identity, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(CLOCKS, values, strict=True)) if done.returncode == 0 and len(values) == len(CLOCKS) else {}


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 0 on a CPU or where torch does not know."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has nothing left to do; a CPU never has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(fn: Callable[[], Any], device: torch.device) -> float:
    """Run ``fn`` once and return its milliseconds: between two events of the stream on a GPU, else by the wall clock.

    Where the host is slower at issuing the work than the GPU at doing it, the events see the waiting too.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        fn()
        return 1000.0 * (time.perf_counter() - begin)
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def repeated_ms(
    fn: Callable[[], Any], device: torch.device, rounds: int = 50, warmup: int = 3, limit_s: float = 2.0
) -> list[float]:
    """Return the milliseconds of up to ``rounds`` runs of ``fn``, at least 3, fewer once ``limit_s`` is over."""
    for _ in range(warmup):
        fn()
    synchronize(device)
    taken: list[float] = []
    until = time.perf_counter() + limit_s
    while len(taken) < rounds and (len(taken) < 3 or time.perf_counter() < until):
        taken.append(timed_ms(fn, device))
    return taken


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed (nearest rank, nothing made up)."""
    return float(sorted(values)[max(math.ceil(share * len(values)), 1) - 1])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, 99th percentile, least and count of milliseconds."""
    return {
        "median_ms": round(median(values), 6),
        "p99_ms": round(quantile(values, 0.99), 6),
        "min_ms": round(min(values), 6),
        "rounds": len(values),
    }


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return ``max|value - truth| / max|truth|`` of two tensors of one shape, in float64."""
    top = float(truth.double().abs().max())
    return float((value.double() - truth.double()).abs().max()) / (top or 1.0)


def rms_error(value: Tensor, truth: Tensor) -> float:
    """Return the root mean square of ``value - truth`` over that of ``truth``, in float64."""
    size = float(truth.double().square().mean().sqrt())
    return float((value.double() - truth.double()).square().mean().sqrt()) / (size or 1.0)


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Measure what the memory gives a plain copy, in bytes per second: ``size`` bytes read and as many written.

    Args:
        device: whose memory.
        size: by default well beyond any cache: 1 GiB on a GPU, 128 MiB on a CPU.
    """
    count = size or 2 ** (30 if device.type == "cuda" else 27)
    source = torch.ones(count, dtype=torch.uint8, device=device)  # written, so that every page exists
    target = torch.zeros_like(source)
    taken = repeated_ms(lambda: target.copy_(source), device, rounds=20, limit_s=1.0)
    return 2.0 * count / (median(taken) / 1000.0)


def write_json(file: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename it: a reader sees the old file or the new one, whole."""
    write_text(file, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """NaN and infinity as words: JSON has no numbers for them, and a broken kernel must not cost its report."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
