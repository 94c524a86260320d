"""The GPU suite's machinery, on a machine without a GPU: parts, resuming, failures, and what it needs to run."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.benchmarks import gpu_suite
from fastdiff.benchmarks.gpu.common import Report, capture, facts, failed, source

ROOT = Path(__file__).parent.parent
FACTS = {"device": "a chip", "versions": {"torch": "1"}, "source": "abc"}


def test_a_part_that_fails_leaves_the_others_and_says_so(tmp_path):
    report = Report(tmp_path / "part.json", 60.0, FACTS)
    report.add({"op": "a"}, lambda: {"ms": 1.0})
    report.add({"op": "b"}, lambda: 1 / 0)
    report.add({"op": "c"}, lambda: {"ms": float("nan"), "ok": False})
    entries = gpu_suite.read_json(tmp_path / "part.json")["entries"]
    assert entries[0] == {"op": "a", "ms": 1.0}
    assert entries[1]["failed"].startswith("ZeroDivisionError")
    assert entries[2]["ms"] == "nan" and failed(entries[2])
    assert not gpu_suite.healthy({"status": "done", "entries": entries})
    assert gpu_suite.healthy({"status": "done", "entries": entries[:1]})
    assert not gpu_suite.healthy({"status": "running", "entries": entries[:1]})


def test_a_part_goes_on_where_it_stopped_unless_something_changed(tmp_path):
    file = tmp_path / "part.json"
    first = Report(file, 60.0, FACTS)
    first.add({"op": "a"}, lambda: {"ms": 1.0})
    first.add({"op": "b"}, lambda: 1 / 0)
    Report(file, -1.0, FACTS).add({"op": "d"}, lambda: {"ms": 3.0})  # no time left
    assert gpu_suite.read_json(file)["not_run"] == [{"op": "d"}]

    again = Report(file, 60.0, FACTS)
    again.add({"op": "a"}, lambda: pytest.fail("measured twice"))
    again.add({"op": "b"}, lambda: {"ms": 2.0})
    assert [entry["ms"] for entry in again.value["entries"]] == [1.0, 2.0]
    for changed in ({"device": "another"}, {"versions": {}}, {"source": "def"}):
        assert Report(file, 60.0, FACTS | changed).value["entries"] == []
        first = Report(file, 60.0, FACTS)
        first.add({"op": "a"}, lambda: {"ms": 1.0})


def test_only_names_parts():
    assert gpu_suite.chosen("loops, unets") == ["loops", "unets"]
    with pytest.raises(argparse.ArgumentTypeError, match="nonsense; allowed: kernels_check"):
        gpu_suite.chosen("loops,nonsense")


def test_a_part_without_a_gpu_is_not_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_suite.main(["--out", str(tmp_path), "--only", "loops"]) == 2
    assert "not measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernels_are_checked_in_the_interpreter_with_nothing_but_what_a_gpu_machine_has(tmp_path):
    pytest.importorskip("triton")
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'PIL', 'tqdm', 'pytest', 'diffusers', 'onnx', 'matplotlib'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch\n"
        "from pathlib import Path\n"
        "from fastdiff.benchmarks import gpu_suite\n"
        "from fastdiff.benchmarks.gpu import kernels_speed, loops, unets\n"
        f"gpu_suite.run_part('kernels_check', Path({str(tmp_path / 'kernels_check.json')!r}), 60.0, 'cpu')\n"
    )
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    value = gpu_suite.read_json(tmp_path / "kernels_check.json")
    assert value["device"] == "interpreter" and value["status"] == "done"
    assert len(value["entries"]) >= 7 and not any(failed(entry) for entry in value["entries"]), value["entries"]


def test_facts_name_the_code_and_the_device():
    found = facts(torch.device("cpu"))
    assert found["device"] == "interpreter" and found["source"] == source() and "torch" in found["versions"]


def test_without_a_gpu_a_captured_call_is_the_call():
    def call() -> int:
        return 3

    assert capture(call, torch.device("cpu")) is call


@pytest.mark.parametrize("op", ["group_norm_silu", "attention", "combine"])
def test_an_entry_of_the_kernel_table_has_every_figure(op, device):
    """On a CPU the times mean nothing; that the table can be made does."""
    pytest.importorskip("triton")
    from fastdiff.benchmarks.gpu import kernels_speed
    from fastdiff.benchmarks.gpu.cases import cases

    case = next(case for case in cases() if case.op == op and case.shape == "tiny")
    found = kernels_speed.contenders(case, torch.float32, device)
    wanted = {"eager", "triton", "torch.compile"} | (
        {"flash", "efficient", "cudnn", "math"} if op == "attention" else set()
    )
    assert set(found) == wanted
    for name in ("eager", "triton", *(["math"] if op == "attention" else [])):
        entry = kernels_speed.measure(case, torch.float32, found[name](), device, copy=1e9, matrix=1e12)
        assert entry["median_ms"] > 0 and entry["error"] <= 1e-5 and entry["bytes"] == case.bytes(torch.float32)
        assert entry["share_of_copy_rate"] > 0 and entry["sizes"] == list(case.sizes)
