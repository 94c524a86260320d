"""Every kernel with every tile, compiled ahead of time for chips that are not here: it fits them and spills nothing.

By default two chips in one dtype each, about a minute of one core; ``pytest tests/test_aot.py --all-chips`` does all of
them in every shipped dtype, about seven minutes. The interpreter proves none of this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

from aot import CHIPS, SHIPPED, Limits  # noqa: E402

from fastdiff.kernels.tiles import TILES, TeamTile, lookup  # noqa: E402

QUICK = [(90, ("float16",)), (120, ("float32",))]
EVERY = [(architecture, tuple(SHIPPED)) for architecture in CHIPS]
HERE = Path(__file__).parent
KERNELS = {"_whole_kernel", "_team_kernel", "_reduce_kernel", "_apply_kernel", "_layer_norm_kernel", "_geglu_kernel"}
KERNELS |= {"_attention_kernel", "_combine_kernel", "_add_kernel"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chip" in metafunc.fixturenames:
        chips = EVERY if metafunc.config.getoption("--all-chips") else QUICK
        metafunc.parametrize("chip", chips, ids=[f"{chip}-{'-'.join(dtypes)}" for chip, dtypes in chips])


def compiling(cache: Path) -> dict[str, str]:
    """The environment of a process where Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"TRITON_CACHE_DIR": str(cache)}


def in_processes(architecture: int, dtypes: tuple[str, ...], cache: Path) -> list[list[Any]]:
    """Run ``aot.py`` in a process for each core; return the lines of each."""
    environment = compiling(cache)
    count = min(4, len(os.sched_getaffinity(0)))
    commands = [[sys.executable, HERE / "aot.py", str(architecture), str(i), str(count), *dtypes] for i in range(count)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    done = [process.communicate() for process in running]
    for process, (out, err) in zip(running, done, strict=True):
        assert process.returncode == 0, out[-2000:] + err[-4000:]
    return [[json.loads(line) for line in out.splitlines()] for out, _ in done]


def test_kernels_fit_chips_that_are_not_here(chip, tmp_path):
    architecture, dtypes = chip
    limits = CHIPS[architecture]
    lines = in_processes(architecture, dtypes, tmp_path)
    kinds = {"float" if dtype == "float32" else "half" for dtype in dtypes}
    every = {row for row in TILES if row[2] in kinds and row[0] != "combine"} | {("combine", "any", "float")}
    assert {tuple(row) for row in lines[0][0]} == every  # no row is left out
    launches = [launch for part in lines for launch in part[1:]]
    assert {launch["kernel"] for launch in launches} == KERNELS
    wrong = [launch for launch in launches if launch["shared"] > limits.shared or launch["stack"]]
    assert not wrong, "\n".join(map(str, wrong))
    for launch in launches:
        if launch["cooperative"]:
            check_residents(launch, architecture, limits)


def check_residents(launch: dict[str, Any], architecture: int, limits: Limits) -> None:
    """As many programs of a team fit a multiprocessor as its tile says; else the driver would refuse the launch."""
    dtype = torch.float32 if launch["dtype"] == "*fp32" else torch.float16
    kind = "team" if launch["constants"].get("residual", "") is None else "team_sum"
    tile = lookup("group_norm_silu", kind, dtype, architecture)
    assert isinstance(tile, TeamTile)
    threads = tile.resident * launch["warps"] * 32
    registers = -(-launch["registers"] // 8) * 8  # given out in eights
    assert threads <= limits.threads and threads * registers <= limits.registers, launch
    assert tile.resident * (launch["shared"] + 1024) <= limits.shared_in_all, launch


def test_a_spill_is_seen(tmp_path):
    """The check can fail: the same kernels, held to few registers."""
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import torch, aot\n"
        "source = next(s for s in aot.sources(90, [torch.float16])[0] if s.kernel.__name__ == '_team_kernel')\n"
        "source.options['maxnreg'] = 40\n"
        "print(aot.resources(source.compile(90).asm['cubin'])['stack'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=compiling(tmp_path), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 0
