"""Model files: found by their published names, read without trust, refused with one line that says why."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_folder, make_model
from torch import nn

from fastdiff.benchmarks.fuzz_files import fuzz
from fastdiff.errors import ArtifactError
from fastdiff.models.files import (
    MAX_JSON_DEPTH,
    MAX_JSON_LISTS,
    MAX_RANK,
    MAX_TENSORS,
    find_weights,
    inside,
    read_json,
    read_tensors,
)
from fastdiff.models.weights import CONFIG, MANIFEST, STEM, WEIGHTS, check_total, fingerprint, load_model

pytestmark = pytest.mark.fast
INDEX = f"{STEM}.safetensors.index.json"
SHARDS = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]


def shard(folder: Path, index: str = INDEX, shards: list[str] = SHARDS) -> dict[str, str]:
    """Replace the one weights file of a folder by an index and two shards; return the map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    table = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for file in shards:
        save_file({name: tensors[name] for name in table if table[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return table


def same(model, other) -> bool:
    ours, theirs = model.network.state_dict(), other.network.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def safetensors(file: Path, header: object, data: bytes = b"") -> Path:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.mark.parametrize("name", ["", "/etc/passwd", "..", "../x", "a/../../x", "a\\..\\x", "a\x00b", "a\nb", "\ud800"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match="allowed are names inside the folder"):
        inside(tmp_path, name)


def test_links_are_followed_only_inside_the_folder(tmp_path):
    root = tmp_path / "model"
    (root / "unet").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (root / "real").write_text("{}")
    links = {"good": "real", "out": "../secret", "far": "/etc/passwd", "loop": "loop", "gone": "../nothing"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "up").symlink_to("..")
    assert inside(root, "good") == root / "good" and inside(root, "unet/config.json") == root / "unet" / "config.json"
    for name in ("out", "far", "gone", "up/secret"):
        with pytest.raises(ArtifactError, match="leaves the model folder"):
            inside(root, name)
    with pytest.raises(ArtifactError, match="loop"):
        inside(root, "loop")


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path, part):
    """``snapshots/<revision>/unet/config.json`` is a link to ``../../../blobs/<hash>``."""
    cache = tmp_path / "models--someone--something"
    folder, blobs = cache / "snapshots" / "0a1b2c" / part, cache / "blobs"
    make_folder(folder)
    blobs.mkdir()
    for i, name in enumerate((CONFIG, MANIFEST, WEIGHTS)):
        (folder / name).rename(blobs / f"hash{i}")
        (folder / name).symlink_to(os.path.relpath(blobs / f"hash{i}", folder))
    assert same(load_model(folder), make_model())
    other = tmp_path / "models--other--one" / "blobs"
    other.mkdir(parents=True)
    (blobs / "deep").mkdir()
    for place in (other / "hash", blobs / "deep" / "hash", cache / "hash", tmp_path / "hash"):
        place.write_bytes((blobs / "hash0").read_bytes())
        (folder / CONFIG).unlink()
        (folder / CONFIG).symlink_to(place)
        with pytest.raises(ArtifactError, match="leaves the model folder"):
            load_model(folder)


def test_blobs_that_are_themselves_a_link_are_not_followed(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x").write_text("{}")
    (tmp_path / "models--a--b" / "blobs").symlink_to(tmp_path / "secret")
    (folder / "x").symlink_to("../../blobs/x")
    with pytest.raises(ArtifactError, match="leaves the model folder"):
        inside(folder, "x")


@pytest.mark.parametrize(
    ("stem", "variant", "name"),
    [
        (STEM, None, f"{STEM}.safetensors"),
        ("model", None, "model.safetensors"),
        (STEM, "fp16", f"{STEM}.fp16.safetensors"),
        ("model", "fp16", "model.fp16.safetensors"),
    ],
)
def test_weights_are_found_under_their_published_names_and_no_other(tmp_path, stem, variant, name):
    save_file({"a": torch.ones(2)}, tmp_path / name)
    assert find_weights(tmp_path, stem, variant) == [tmp_path / name]
    for other in {None, "fp16", "ema"} - {variant}:
        with pytest.raises(ArtifactError) as caught:
            find_weights(tmp_path, stem, other)
        looked = f"{stem}.{other}.safetensors" if other else f"{stem}.safetensors"
        assert f"{looked}: no such file, nor " in str(caught.value) and f"there is '{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "index", "shards"),
    [
        (None, INDEX, SHARDS),
        ("fp16", f"{STEM}.safetensors.index.fp16.json", [name.replace("-0", ".fp16-0", 1) for name in SHARDS]),
        ("fp16", f"{STEM}.fp16.safetensors.index.json", [name.replace("-0", ".fp16-0", 1) for name in SHARDS]),
    ],
)
def test_shards_are_one_model(tmp_path, variant, index, shards):
    folder = make_folder(tmp_path)
    shard(folder, index, shards)
    assert same(load_model(folder, variant=variant), make_model())
    assert find_weights(folder, STEM, variant) == [folder / name for name in (index, *shards)]


def test_the_fingerprint_covers_every_shard_and_is_that_of_the_file_where_there_is_one(tmp_path):
    folder = make_folder(tmp_path)
    shard(folder)
    before = fingerprint(folder)
    data = bytearray((folder / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (folder / SHARDS[1]).write_bytes(data)
    assert fingerprint(folder) != before


def test_two_sets_of_weights_under_one_name_are_refused(tmp_path):
    folder = make_folder(tmp_path)
    data = (folder / WEIGHTS).read_bytes()
    shard(folder)
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"holds both {WEIGHTS} and {INDEX}"):
        load_model(folder)


@pytest.mark.parametrize(
    "place",
    [
        "../out.safetensors",
        "/out.safetensors",
        "a/b.safetensors",
        "",
        "..",
        "x.bin",
        "a\nb.safetensors",
        3,
        None,
        ["a"],
    ],
    ids=repr,
)
def test_a_shard_elsewhere_is_refused(tmp_path, place):
    folder = make_folder(tmp_path / "model")
    table = shard(folder)
    save_file({"conv_in.bias": torch.zeros(8)}, tmp_path / "out.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {**table, "conv_in.bias": place}}))
    with pytest.raises(
        ArtifactError, match="'conv_in.bias' lies in .* allowed: a .safetensors file beside it"
    ) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe", "link out", "cut"])
def test_whatever_stands_in_place_of_a_shard_is_refused(tmp_path, instead):
    folder = make_folder(tmp_path / "model")
    shard(folder)
    file = folder / SHARDS[1]
    moved = file.rename(tmp_path / SHARDS[1])
    if instead == "folder":
        file.mkdir()
    elif instead == "pipe":
        os.mkfifo(file)
    elif instead == "link out":
        file.symlink_to(moved)
    elif instead == "cut":
        file.write_bytes(moved.read_bytes()[:-1])
    message = {"nothing": "no such file", "folder": "is a folder", "pipe": "not a plain file",
               "link out": "leaves the model folder", "cut": "not a whole safetensors file"}[instead]  # fmt: skip
    with pytest.raises(ArtifactError, match=f"{SHARDS[1]}.*{message}"):
        load_model(folder)


def test_an_index_and_its_shards_must_agree_tensor_by_tensor(tmp_path):
    folder = make_folder(tmp_path)
    table = shard(folder)
    one, two = list(table)[:2]
    cases = [
        ({k: v for k, v in table.items() if k != one}, f"'{one}' is not listed for {SHARDS[0]}"),
        ({**table, one: SHARDS[1]}, f"'{one}' is (missing from {SHARDS[1]}|not listed for {SHARDS[0]})"),
        ({**table, "stranger": SHARDS[0]}, f"'stranger' is missing from {SHARDS[0]}"),
        ({}, "weight_map is {}"),
        ([1], r"weight_map is \[1\]"),
    ]
    for changed, message in cases:
        (folder / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ArtifactError, match=message):
            load_model(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    tensors = load_file(folder / SHARDS[1])
    save_file({**tensors, one: torch.zeros(1)}, folder / SHARDS[1])
    with pytest.raises(ArtifactError, match=f"'{one}' is also in {SHARDS[1]}"):
        load_model(folder)
    save_file({name: value for name, value in tensors.items() if name != two}, folder / SHARDS[1])
    with pytest.raises(ArtifactError, match=f"'{two}' is missing from {SHARDS[1]}"):
        load_model(folder)


def test_reading_copies_nothing(tmp_path):
    """The file's pages are mapped: what is read takes none of the process's own memory."""

    def own_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    save_file({"a": torch.ones(8, 2**20), "b": torch.ones(8, 2**20)}, tmp_path / "x.safetensors")  # 64 MiB
    before = own_kib()
    tensors = read_tensors(tmp_path / "x.safetensors")
    assert sum(float(value.sum()) for value in tensors.values()) == 2**24
    assert own_kib() - before < 16 * 1024


def test_headers_that_would_take_long_to_read_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    cases = [
        ({str(i): empty for i in range(MAX_TENSORS + 1)}, f"at most {MAX_TENSORS}"),
        ({"a": {**empty, "shape": [0] + [1] * MAX_RANK}}, f"at most {MAX_RANK}"),
        ({"a": [[]] * (MAX_JSON_LISTS + 1)}, f"at most {MAX_JSON_LISTS}"),
        (b" " * (9 * 2**20), "a header of 9437184 bytes"),
        (b'{"a":' + json.dumps(empty).encode() + b',"a":' + json.dumps(empty).encode() + b"}", "'a' is there twice"),
    ]
    for header, message in cases:
        with pytest.raises(ArtifactError, match=message):
            read_tensors(safetensors(file, header))
    for length in (2, 2**40, 2**63, 2**64 - 1):
        file.write_bytes(struct.pack("<Q", length) + b"{")
        with pytest.raises(ArtifactError, match=f"a header of {length} bytes in 9"):
            read_tensors(file)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "C64", "I8", "BOOL"])
def test_weights_that_are_no_floats_torch_can_convert_are_refused(tmp_path, dtype):
    folder = make_folder(tmp_path)
    header, data = {}, b""
    for name, value in load_file(folder / WEIGHTS).items():
        bits = value.numel() * {"F4": 4, "C64": 64}.get(dtype, 8)
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(data), len(data) + bits // 8]}
        data += bytes(bits // 8)
    safetensors(folder / WEIGHTS, header, data)
    with pytest.raises(ArtifactError):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        ('{"x": {"a": 1, "a": 2}}', "'a' is there twice"),
        ('{"x":' * MAX_JSON_DEPTH + "1" + "}" * MAX_JSON_DEPTH, None),
        ('{"x":' * (MAX_JSON_DEPTH + 1) + "1" + "}" * (MAX_JSON_DEPTH + 1), f"deeper than {MAX_JSON_DEPTH}"),
        ('{"x":[' + "[]," * MAX_JSON_LISTS + "1]}", f"at most {MAX_JSON_LISTS}"),
        ("3", "holds a int; allowed is one JSON object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_means_two_things_or_costs_too_much_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    if message is None:
        assert read_json(tmp_path / "x.json")
        return
    with pytest.raises(ArtifactError, match=message):
        read_json(tmp_path / "x.json")


def test_an_unreadable_path_is_refused(tmp_path):
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        for read in (read_json, read_tensors):
            with pytest.raises(ArtifactError, match="cannot be read"):
                read(path)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo pickle ran code > /tmp/fastdiff-evil",)


def test_pickles_are_refused_unless_asked_for_by_name(tmp_path):
    folder = make_folder(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({"state_dict": tensors, "epoch": 3}, folder / f"{STEM}.bin")
    with pytest.raises(ArtifactError, match=rf"{STEM}.bin: a pickle, and no {WEIGHTS}; allow_pickle=True"):
        load_model(folder)
    with pytest.raises(ArtifactError, match="allow_pickle=True"):
        read_tensors(folder / f"{STEM}.bin")
    assert same(load_model(folder, allow_pickle=True), make_model())
    save_file({name: value + 1 for name, value in tensors.items()}, folder / WEIGHTS)
    assert find_weights(folder, STEM, allow_pickle=True) == [folder / WEIGHTS]  # safetensors come first


@pytest.mark.parametrize("ending", [".bin", ".ckpt", ".pt", ".pth"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_a_pickle_of_tensors_is_read(tmp_path, ending, old):
    file = tmp_path / f"x{ending}"
    torch.save({"a": nn.Parameter(torch.arange(4.0)), "b": torch.ones(2).half()}, file,
               _use_new_zipfile_serialization=not old)  # fmt: skip
    got = read_tensors(file, allow_pickle=True)
    assert list(got) == ["a", "b"] and torch.equal(got["a"], torch.arange(4.0)) and not got["a"].requires_grad


@pytest.mark.parametrize(
    "held",
    [
        {"a": Evil()},
        {"a": torch.zeros(1).expand(100_000, 100_000)},  # four bytes that stand for forty billion
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": 3},
        {1: torch.zeros(1)},
        {"state_dict": {"a": "b"}},
        {},
        [torch.zeros(1)],
        nn.Linear(1, 1),
    ],
    ids=lambda value: type(value).__name__ + str(list(value) if isinstance(value, dict) else ""),
)
def test_a_pickle_of_anything_else_is_refused(tmp_path, held):
    file = tmp_path / "x.pt"
    torch.save(held, file)
    with pytest.raises(ArtifactError) as caught:
        read_tensors(file, allow_pickle=True)
    assert "\n" not in str(caught.value) and not Path("/tmp/fastdiff-evil").exists()


def test_damaged_and_compressed_pickles_are_refused(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(100_000)}, file)
    whole = file.read_bytes()
    for data in (b"", b"\x80\x02}", whole[:100], whole[:-30], b"PK\x03\x04", b"not a pickle"):
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="not a checkpoint of tensors alone"):
            read_tensors(file, allow_pickle=True)
    file.write_bytes(whole)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(ArtifactError, match="is compressed"):
        read_tensors(tmp_path / "y.pt", allow_pickle=True)


def test_a_module_is_counted_before_memory_is_taken():
    with torch.device("meta"):
        module = nn.Linear(10**6, 10**6)
    with pytest.raises(ArtifactError, match="config.json: describes a network of 1000001000000 numbers; .* 1000$"):
        check_total(module, 1000, "config.json")
    check_total(module, 10**12 + 10**6, "config.json")


def test_a_config_that_describes_more_than_the_weights_hold_is_refused_before_it_is_built(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    monkeypatch.setattr("fastdiff.models.weights.UNet", lambda *_: pytest.fail("the network was built"))
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, "layers_per_block": 64}))
    with pytest.raises(ArtifactError, match=f"{WEIGHTS}: .* tensors; a network of these sizes has"):
        load_model(folder)


def test_spoiled_files_are_refused_or_read_right(tmp_path):
    """A few hundred of the ten thousand of ``python -m fastdiff.benchmarks.fuzz_files``."""
    found = fuzz(250, 0, tmp_path)
    assert not found["failures"], found["failures"][:3]
    assert found["count"] == 250 and found["crashes"] == 0
    assert found["outcomes"]["loaded"] > 10 and found["outcomes"]["ArtifactError"] > 200
    assert len(found["ways"]) >= 10
