"""Settings of the whole suite. Triton's interpreter must be chosen before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch
from drawing import Draw

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["FASTDIFF_MEASURE"] = "0"  # the same choices on every machine, and no time spent on measuring
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, and so do the processes they start
    share = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ["OMP_NUM_THREADS"] = str(share)
    torch.set_num_threads(share)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Settings of the command line."""
    parser.addoption("--all-chips", action="store_true", help="test_aot.py: every chip and dtype, about seven minutes")


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def draw(device: torch.device) -> Draw:
    """Seeded random inputs on that device."""
    return Draw(device)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
