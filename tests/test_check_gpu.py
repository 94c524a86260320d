"""How the bars of GPU speed are read from the suite's files."""

from __future__ import annotations

from fastdiff.benchmarks.check_gpu import STEPS, memory, proofs, steps


def entry(layout: str, batch: int, by: str, ms: float, error: float = 1e-3) -> dict:
    return {"layout": layout, "batch": batch, "by": by, "median_ms": ms, "error": error}


def test_nothing_measured_is_nothing_met():
    bars = [*steps({}), *proofs({}), *memory({})]
    assert len(bars) == 4 * len(STEPS) + 5 + 2 and not any(bar.ok for bar in bars)
    assert all(bar.value is None for bar in bars)


def test_ratios_are_to_the_peers_of_the_same_run():
    plain = {"entries": [entry("sd15", 2, "eager", 14.0), entry("sd15", 2, "fastdiff", 3.0, 3e-3)]}
    compiled = {"entries": [entry("sd15", 2, "torch.compile", 4.0)]}
    found = {bar.bar: bar for bar in steps({"unets": plain, "compile": compiled})}
    assert found["sd15 batch 2: ms per step"].ok
    assert found["sd15 batch 2: time over eager's"].value == 0.214286
    assert not found["sd15 batch 2: time over torch.compile's"].ok  # 0.75 of it
    assert not found["sd15 batch 2: error over plain torch's"].ok  # three times it
    assert found["sdxl batch 8: ms per step"].value is None


def test_the_memory_of_a_small_card():
    entries = [{"model": "sdxl", "peak_gb": 7.5}, {"model": "sd15", "peak_gb": 4.5}]
    assert [(bar.value, bar.ok) for bar in memory({"memory": {"entries": entries}})] == [(7.5, True), (4.5, False)]


def test_a_wrong_entry_counts_as_not_measured_and_a_failed_proof_is_not_met():
    broken = {"entries": [entry("sd15", 2, "fastdiff", 1.0) | {"failed": "OutOfMemoryError"}]}
    assert next(iter(steps({"unets": broken}))).value is None
    entries = [{"proof": "two threads", "equal": True}, {"proof": "memory returns", "equal": False}]
    found = {bar.bar: bar.ok for bar in proofs({"proofs": {"entries": entries}})}
    assert found["proof: two threads, failures of 1"] and not found["proof: memory returns, failures of 1"]
