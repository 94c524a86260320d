"""From what the kernel parts measured to bars, and to rows of the table of attention."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from fastdiff.benchmarks.gpu.kernel_bars import kernel_bars, table  # noqa: E402
from fastdiff.kernels.dispatch import CANDIDATES, choose  # noqa: E402

GPU = {"device": "a GPU", "environment": {"gpu": {"compute_capability": "9.0"}}, "status": "done", "not_run": []}


def norm(elements: int, share: float, ms: float, launches: int, by: str = "triton") -> dict[str, Any]:
    entry = {"op": "group_norm_silu", "shape": str(elements), "dtype": "torch.float16", "by": by, "bytes": 4 * elements}
    return entry | {"share_of_copy_rate": share, "median_ms": ms, "launches": launches}


def attention(shape: str, sizes: tuple[int, int, int], **ms: float) -> list[dict[str, Any]]:
    label = {"op": "attention", "shape": shape, "dtype": "torch.float16", "sizes": list(sizes)}
    return [label | {"by": by, "median_ms": value} for by, value in ms.items()]


def bars(check: Any, speed: Any) -> dict[str, Any]:
    return {bar.bar: bar for bar in kernel_bars(check, speed)}


def test_what_was_not_measured_is_not_met():
    found = bars(None, None)
    assert len(found) == 11
    assert all(bar.value is None and not bar.ok and "not measured" in bar.bound for bar in found.values())


def test_the_interpreter_counts_for_itself_alone():
    entries = [{"op": "geglu", "ok": True}, {"op": "attention", "ok": False}, {"op": "combine", "failed": "x"}]
    part = {"device": "interpreter", "status": "done", "not_run": [], "entries": entries[:1]}
    found = bars(part, None)
    assert found["kernels against float64 on the interpreter: entries out of tolerance"].ok
    assert found["kernels against float64 on a GPU: entries out of tolerance"].value is None
    found = bars(part | GPU | {"entries": entries}, None)
    bar = found["kernels against float64 on a GPU: entries out of tolerance"]
    assert bar.value == 2 and not bar.ok
    unfinished = bars(part | GPU | {"not_run": [{"op": "geglu"}]}, None)
    assert not unfinished["kernels against float64 on a GPU: entries out of tolerance"].ok


def test_norms_are_judged_by_the_worst():
    entries = [norm(40_000_000, 0.9, 0.1, 1), norm(50_000_000, 0.86, 0.1, 1), norm(5_000_000, 0.1, 9.0, 5)]
    entries += [norm(500_000, 0.1, 0.003, 1), norm(900_000, 0.1, 0.0039, 1), norm(900_000, 0.1, 0.1, 9, by="eager")]
    found = bars(None, GPU | {"entries": entries})
    assert found["group norm + SiLU above 64 MB: least share of copy speed"][1:] == (0.86, ">= 0.85", True)
    assert found["group norm + SiLU below 2 MB: most launches"][1:] == (1, "<= 1", True)
    assert found["group norm + SiLU below 2 MB: most microseconds"][1:] == (3.9, "<= 4", True)
    slow = bars(None, GPU | {"entries": [*entries, norm(40_000_001, 0.8, 0.1, 1), norm(1, 0.1, 0.005, 2)]})
    assert not any(bar.ok for name, bar in slow.items() if name.startswith("group norm"))


def test_attention_is_judged_against_the_fastest_and_the_table_follows():
    entries = attention("self 4k d40", (4096, 4096, 40), triton=1.0, eager=1.5, flash=1.3, efficient=2.0, math=9.0)
    entries += attention("self 1k d80", (1024, 1024, 80), triton=1.1, eager=1.0, flash=1.0, cudnn=0.8)
    entries += attention("cross d40", (4096, 77, 40), triton=0.6, eager=1.0, flash=1.1)
    entries += attention("tiny", (64, 64, 32), triton=9.0, eager=1.0)
    part = GPU | {"entries": entries}
    found = bars(None, part)
    assert found["attention d = 40: least speed over SDPA's FlashAttention-2"][1:] == (1.3, ">= 1.2", True)
    assert not found["attention d = 80: least speed over SDPA's FlashAttention-2"].ok
    assert found["attention d = 160: least speed over SDPA's FlashAttention-2"].value is None
    assert found["cross-attention over 77 keys: most time over SDPA's"][1:] == (0.6, "<= 0.67", True)

    rows = table(part)
    assert {kind: by for (_, kind, _), (by, _) in rows.items()} == {
        "4k_40": "triton", "1k_80": "cudnn", "cross_40": "triton"
    }  # fmt: skip
    assert all(by in CANDIDATES for by, _ in rows.values())
    import torch

    assert choose(4096, 4096, 40, torch.float16, 90, rows).by == "triton"


def test_the_shipped_table_is_judged_by_what_it_chooses():
    """Without a row torch decides by itself, and may not take its fastest backend."""
    entries = attention("self 4k d64", (4096, 4096, 64), triton=1.0, eager=1.5, flash=1.5, cudnn=1.2)
    found = bars(None, GPU | {"entries": entries})
    bar = found["attention by the table: least speed over the fastest of SDPA's backends"]
    assert bar.value == pytest.approx(0.8) and not bar.ok
    assert found["attention: shapes for which our kernel is chosen"].value == "0 of 1"
