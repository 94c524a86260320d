"""A small run of ``benchmarks/export_safety.py``, in a process of its own: it forks, and this one has built engines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("tensorrt_rtx", reason="builds need TensorRT for RTX (pip install 'fastdiff[tensorrt-rtx]')")


def test_kills_and_changed_bits_do_no_harm(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "fastdiff.benchmarks.export_safety", "--kills", "4", "--flips", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    bars = [json.loads(line) for line in done.stdout.splitlines()]
    assert [bar["value"] for bar in bars] == [4, 100, 10, 0] and all(bar["ok"] for bar in bars)
