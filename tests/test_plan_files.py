"""A plan reaches TensorRT only if this user's cache made it, or its hash was named, and no bit of it changed."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace

import pytest
import torch

from fastdiff.backends import trt
from fastdiff.backends.plan_files import (
    KEY_FILE,
    PlanManifest,
    load_manifest,
    manifest_of,
    read_plan,
    read_sealed,
    save_manifest,
    write_sealed,
)
from fastdiff.backends.trt_library import Library
from fastdiff.errors import ArtifactError, BackendError
from fastdiff.models.files import sha256

pytestmark = pytest.mark.fast
MINE = {"library": "tensorrt_rtx", "version": "1.7"}
FLIPS = 300


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def plan(user, tmp_path):
    file = tmp_path / "model.plan"
    file.write_bytes(random.Random(0).randbytes(2000))
    facts = PlanManifest(sha256(file), 2000, "key", "tensorrt_rtx", "1.7", ("sm86",), "graph", {"kind": "unet"})
    save_manifest(file, facts)
    return file


class Spy:
    """Stands where TensorRT would, and counts how many plans reach it."""

    def __init__(self):
        self.reached = 0
        self.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1})
        self.__version__ = "1.7"

    def Runtime(self, logger):  # noqa: N802
        return self

    def deserialize_cuda_engine(self, plan):
        self.reached += 1


@pytest.fixture
def spy(monkeypatch):
    """A machine with a GPU and TensorRT for RTX, as far as loading goes."""
    spy = Spy()
    monkeypatch.setattr(trt, "find_library", lambda name: Library(name, spy))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    return spy


def load(file, **how):
    return trt.load_engine(file, torch.device("cuda"), **how)


def test_a_plan_of_this_cache_is_read(plan):
    content, manifest = read_plan(plan, **MINE)
    assert content == plan.read_bytes() and manifest.graph == {"kind": "unet"} and manifest.architectures == ("sm86",)


def test_a_good_plan_reaches_the_library_and_what_it_says_is_passed_on(plan, spy):
    with pytest.raises(BackendError, match="TensorRT for RTX refuses it: it gave no reason"):
        load(plan)
    assert spy.reached == 1


def flipped(whole: bytes, seed: int):
    """Copies of ``whole`` with one bit changed, at places drawn at random."""
    draw = random.Random(seed)
    for _ in range(FLIPS):
        content, bit = bytearray(whole), draw.randrange(8 * len(whole))
        content[bit // 8] ^= 1 << bit % 8
        yield bytes(content)


@pytest.mark.parametrize("part", ["plan", "manifest"])
def test_nothing_with_a_changed_bit_reaches_the_library(plan, spy, part):
    file = plan if part == "plan" else manifest_of(plan)
    for content in flipped(file.read_bytes(), seed=1):
        file.write_bytes(content)
        with pytest.raises(ArtifactError):
            load(plan)
    assert spy.reached == 0


@pytest.mark.parametrize("change", [b"", b"\0", "short", "long"], ids=str)
def test_a_plan_of_another_length_is_refused(plan, spy, change):
    whole = plan.read_bytes()
    plan.write_bytes({"short": whole[:-1], "long": whole + b"\0"}.get(change, change))
    with pytest.raises(ArtifactError, match="bytes; its manifest says 2000"):
        load(plan)
    assert spy.reached == 0


def test_a_plan_of_a_stranger_is_refused_until_its_manifest_is_named(plan, user, spy):
    (user / KEY_FILE).unlink()  # sealed by somebody else, as far as this user can tell
    name = sha256(manifest_of(plan))
    for how in ({}, {"trusted": ["0" * 64]}, {"trusted": [sha256(plan)]}):
        with pytest.raises(ArtifactError, match="was not sealed by this user's cache, nor is it one that is trusted"):
            load(plan, **how)
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="not those its manifest describes"):
        load(plan, trusted=[name])
    plan.write_bytes(whole)
    assert spy.reached == 0
    with pytest.raises(BackendError):
        load(plan, trusted=[name])
    assert spy.reached == 1


def test_a_plan_without_a_manifest_is_refused(plan, spy):
    manifest_of(plan).unlink()
    for how in ({}, {"trusted": [sha256(plan)]}):
        with pytest.raises(ArtifactError, match="has no manifest .* refused"):
            load(plan, **how)
    assert spy.reached == 0


def test_a_manifest_that_its_maker_changed_is_sealed_again_and_any_other_is_not(plan):
    values = json.loads(manifest_of(plan).read_text())
    manifest_of(plan).write_text(json.dumps(values | {"architectures": ["sm89"]}))
    with pytest.raises(ArtifactError, match="was not sealed"):
        read_plan(plan, **MINE)
    save_manifest(plan, replace(load_manifest(plan)))
    assert read_plan(plan, **MINE)[1].architectures == ("sm89",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "not format 1"),
        ({"bytes": "many"}, "bytes is missing or no int"),
        ({"refit": 1}, "refit is missing or no bool"),
        ({"seal": None}, "seal is missing or no str"),
        ({"extra": 1}, "unknown entry 'extra'"),
    ],
)
def test_what_is_no_manifest_is_refused(plan, change, says):
    values = json.loads(manifest_of(plan).read_text())
    manifest_of(plan).write_text(json.dumps(values | change))
    with pytest.raises(ArtifactError, match=says):
        load_manifest(plan)


@pytest.mark.parametrize(
    "here", [{"library": "tensorrt", "version": "1.7"}, {"library": "tensorrt_rtx", "version": "2"}]
)
def test_a_stale_plan_is_refused(plan, here):
    with pytest.raises(ArtifactError, match=f"was built by tensorrt_rtx 1.7; here is {here['library']}"):
        read_plan(plan, **here)


def test_a_plan_for_another_gpu_is_refused(plan, spy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    with pytest.raises(ArtifactError, match="was built for sm86; this GPU is sm89"):
        load(plan)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(BackendError, match=r"this GPU is sm90; TensorRT for RTX serves sm75, .*pip install"):
        load(plan)
    assert spy.reached == 0


def test_a_machine_without_a_gpu_says_so(plan, spy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="torch sees no GPU here"):
        load(plan)
    with pytest.raises(BackendError, match="device is 'cpu'"):
        trt.load_engine(plan, torch.device("cpu"))


@pytest.mark.parametrize("damage", ["open", "short"])
def test_a_key_that_others_can_read_is_refused(plan, user, damage):
    if damage == "open":
        (user / KEY_FILE).chmod(0o644)
    else:
        (user / KEY_FILE).write_bytes(b"short")
    with pytest.raises(BackendError, match="only you can read"):
        read_plan(plan, **MINE)


def test_the_key_is_made_once_and_for_one_user(plan, user):
    status = (user / KEY_FILE).stat()
    assert status.st_mode & 0o077 == 0 and os.listdir(user) == [KEY_FILE]
    before = (user / KEY_FILE).read_bytes()
    save_manifest(plan, load_manifest(plan))
    assert (user / KEY_FILE).read_bytes() == before


def test_sealed_bytes_come_back_or_not_at_all(user, tmp_path):
    file = tmp_path / "timings"
    assert read_sealed(file) is None
    write_sealed(file, b"measured")
    assert read_sealed(file) == b"measured" and os.listdir(tmp_path) == ["user", "timings"]
    for content in flipped(file.read_bytes(), seed=3):
        file.write_bytes(content)
        assert read_sealed(file) is None


def test_one_missing_library_is_one_line(monkeypatch):
    from fastdiff.backends import trt_library

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(trt_library.importlib, "import_module", missing)
    with pytest.raises(BackendError, match=r"TensorRT is not installed: pip install 'fastdiff\[tensorrt\]' or pip"):
        trt_library.find_library()
    with pytest.raises(
        BackendError, match=r"TensorRT for RTX is not installed: pip install 'fastdiff\[tensorrt-rtx\]'"
    ):
        trt_library.find_library("tensorrt_rtx")
    with pytest.raises(BackendError, match="unknown library 'onnx'; allowed: tensorrt, tensorrt_rtx"):
        trt_library.find_library("onnx")

    def broken(name):
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(trt_library.importlib, "import_module", broken)
    with pytest.raises(BackendError, match="TensorRT does not load: libnvinfer.so.11"):
        trt_library.find_library()


def test_a_logger_tells_the_first_error_of_each_failure():
    from fastdiff.backends.trt_library import make_logger

    logger = make_logger(Library("tensorrt", Spy()))
    for level, message in ((2, "a warning"), (1, "the cause\n of it"), (0, "what follows")):
        logger.log(level, message)
    assert [logger.said(), logger.said()] == ["the cause of it", "it gave no reason"]
