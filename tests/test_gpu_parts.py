"""The parts of the GPU suite, run whole on a CPU at small sizes with recorded torch calls in the place of CUDA graphs.

What they say of speed means nothing here; that they run, and that their proofs hold and can fail, does.
"""

from __future__ import annotations

import pytest
import torch
from narrow_unets import narrow_sizes
from recorded import Recorder

from fastdiff import graph
from fastdiff.benchmarks.environment import timed_ms
from fastdiff.benchmarks.gpu import loops, memory, proofs, unets
from fastdiff.benchmarks.gpu.common import Report, failed
from fastdiff.benchmarks.layouts import DDPM_CIFAR, SDXL, scaled
from fastdiff.kernels import REFERENCE

CPU = torch.device("cpu")


@pytest.fixture
def report(tmp_path, monkeypatch) -> Report:
    monkeypatch.setattr(graph, "CUDA", Recorder())
    for module in (unets, loops):
        monkeypatch.setattr(module, "repeated_ms", lambda fn, *_, **__: [timed_ms(fn, CPU)])
    monkeypatch.setattr(proofs, "TURNS", 3)
    return Report(tmp_path / "part.json", 600.0, {"device": "a CPU"})


def entries(report: Report, expected: int) -> list[dict]:
    found = report.value["entries"]
    assert len(found) == expected and not report.value["not_run"]
    assert not [entry for entry in found if failed(entry)]
    return found


def test_unets(report, monkeypatch):
    small = {"ddpm": (scaled(DDPM_CIFAR, 16), 8, (1, 2)), "sdxl": (scaled(SDXL, 16), 8, (2,))}
    monkeypatch.setattr(unets, "CASES", small)
    monkeypatch.setattr(unets, "triton_ops", lambda: REFERENCE)
    monkeypatch.setattr(unets, "DTYPE", torch.bfloat16)
    with torch.no_grad():
        unets.part(report, CPU)
    found = entries(report, 9)
    assert all(0 < entry["error"] < 0.1 for entry in found)
    assert {entry["by"] for entry in found} == set(unets.PLAIN)


def test_memory(report, monkeypatch):
    models = {name: narrow_sizes(name) for name in memory.FAMILIES}
    monkeypatch.setattr(memory, "sizes", models.__getitem__)
    with torch.no_grad():
        memory.part(report, CPU)
    for entry in entries(report, 2):
        assert entry["pixels"] == [128, 128] and entry["account_gb"]["unet_peak"] > entry["account_gb"]["unet_weights"]


def test_loops(report, monkeypatch):
    monkeypatch.setattr(loops, "LOOPS", (("flow_map", 2, 1), ("ddim", 3, 1), ("ddim", 3, 2)))
    monkeypatch.setattr(loops, "BATCHES", (2,))
    monkeypatch.setattr(loops, "DTYPES", (torch.float32,))
    with torch.no_grad():
        loops.part(report, CPU)
    for entry in entries(report, 9):
        assert entry["error"] < 1e-4 if entry["cache_interval"] == 1 else 1e-4 < entry["error"] < 1


def test_proofs(report, monkeypatch):
    monkeypatch.setattr(proofs, "DTYPES", (torch.float32,))
    monkeypatch.setattr(proofs, "SOLVERS", ("flow_map", "ddpm"))
    monkeypatch.setattr(proofs, "watch_works", lambda _: {"raised": True})  # the watch is torch's, for GPUs
    with torch.no_grad():
        proofs.part(report, CPU)
    found = entries(report, 1 + 2 * 3 + 4 + 1 + 1 + 2)
    assert all(entry["swap_mattered"] for entry in found if "swap_mattered" in entry)


def test_a_loop_that_differs_fails_its_proof(report, monkeypatch):
    plain = proofs.pipeline(CPU, torch.float32, "captured_loop").network.plain()
    calls = []

    def other(self, x, row_index, prepared, control=()):
        calls.append(1)
        return x * (0.5 + 1e-6 * len(calls))

    monkeypatch.setattr(type(plain), "__call__", other)
    with torch.no_grad():
        report.add({"proof": "captured"}, lambda: proofs.captured_is_uncaptured(CPU, torch.float32, "ddim"))
    assert failed(report.value["entries"][0]) and not report.value["entries"][0]["equal"]
