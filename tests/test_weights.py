"""Model folders: exact round trips, whole files or none, and one typed line for everything that is not a model."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_folder, make_model

from fastdiff.errors import ArtifactError
from fastdiff.models import files
from fastdiff.models.files import MAX_JSON_BYTES, read_json, read_tensors, sha256
from fastdiff.models.weights import CONFIG, MANIFEST, TARGET_WEIGHTS, WEIGHTS, load_model, load_strictly, save_model

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model", two_time=True)


def refusal(folder) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(ArtifactError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600, message
    return message


def edit(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("two_time", [False, True])
@pytest.mark.parametrize("classes", [False, True])
def test_a_round_trip_is_exact_and_leaves_nothing_temporary(tmp_path, two_time, classes):
    model = make_model(two_time=two_time, classes=classes)
    save_model(model, tmp_path / "new" / "model", torch.float32)
    expected = {CONFIG, MANIFEST, WEIGHTS} | ({TARGET_WEIGHTS} if two_time else set())
    assert set(os.listdir(tmp_path / "new" / "model")) == expected
    back = load_model(tmp_path / "new" / "model")
    assert back.info == model.info and back.network.config == model.network.config
    assert back.network.target == model.network.target
    wanted = model.network.state_dict()
    got = back.network.state_dict()
    assert list(got) == list(wanted) and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert not back.network.training and not any(p.requires_grad for p in back.network.parameters())


def test_the_ordinary_weights_hold_nothing_of_the_second_time(folder):
    assert not any(name.startswith("target_embedding") for name in load_file(folder / WEIGHTS))
    assert all(name.startswith("target_embedding") for name in load_file(folder / TARGET_WEIGHTS))


def test_half_precision_is_rounded_once(tmp_path):
    model = make_model()
    save_model(model, tmp_path)  # float16 by default
    for name, value in load_model(tmp_path).network.state_dict().items():
        assert torch.equal(value, model.network.state_dict()[name].half().float())


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(folder, monkeypatch, failing):
    before = {name: sha256(folder / name) for name in os.listdir(folder)}

    def full(tensors, file, metadata):
        file.write_bytes(b"half a file")
        raise OSError("no space left on device")

    def stuck(self, target):
        raise OSError("interrupted")

    if failing == "save_file":
        monkeypatch.setattr(files, "save_file", full)
    else:
        monkeypatch.setattr(files.Path, "replace", stuck)
    with pytest.raises(OSError):
        save_model(make_model(two_time=True, seed=1), folder, torch.float32)
    monkeypatch.undo()
    assert {name: sha256(folder / name) for name in os.listdir(folder)} == before
    load_model(folder)


def test_strict_loading_names_the_first_wrong_tensor():
    network = make_model().network
    right = network.state_dict()
    name = "mid_block.resnets.0.conv1.weight"
    cases = [
        ({k: v for k, v in right.items() if k != name}, f"'{name}' is missing"),
        ({**right, "stranger.weight": torch.zeros(1)}, "'stranger.weight' does not belong"),
        ({**right, name: right[name][:-1]}, r"is \[15, 16, 3, 3\]; needed: \[16, 16, 3, 3\]"),
        ({**right, name: right[name].int()}, f"'{name}' is torch.int32"),
    ]
    for tensors, message in cases:
        with pytest.raises(ArtifactError, match=message) as caught:
            load_strictly(network, tensors, "file")
        assert name in str(caught.value) or "stranger" in str(caught.value)


@pytest.mark.parametrize("name", [WEIGHTS, TARGET_WEIGHTS])
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder, name, keep):
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS, TARGET_WEIGHTS, CONFIG, MANIFEST])
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe", "link out", "foreign"])
def test_whatever_stands_in_place_of_a_file_is_refused(folder, tmp_path, name, instead):
    file = folder / name
    moved = file.rename(tmp_path / name)
    if instead == "folder":
        file.mkdir()
    elif instead == "pipe":
        os.mkfifo(file)
    elif instead == "link out":
        file.symlink_to(moved)
    elif instead == "foreign":
        file.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 8)
    message = refusal(folder)
    assert name in message
    if instead == "link out":
        assert "leaves the model folder" in message


def test_a_link_inside_the_folder_is_allowed(folder):
    (folder / WEIGHTS).rename(folder / "real.safetensors")
    (folder / WEIGHTS).symlink_to("real.safetensors")
    load_model(folder)


def test_weights_of_another_network_are_refused(folder):
    save_file({"something.else": torch.zeros(3)}, folder / WEIGHTS)
    assert "5 tensors; a network of these sizes has" in refusal(folder)


def test_a_folder_that_is_none_is_refused(folder, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(folder / CONFIG)


ABSURD = [
    {"block_out_channels": [65536, 65536], "norm_num_groups": 4096},
    {"block_out_channels": [65536] * 2, "layers_per_block": 64},
    {"num_class_embeds": 1_000_000, "time_embedding_dim": 1_000_000},
    {"in_channels": 4096, "sample_size": 16384},
    {"block_out_channels": [10**15, 10**15]},
    {"layers_per_block": 10**9},
    {"attention_head_dim": 10**9},
]


@pytest.mark.parametrize("sizes", ABSURD, ids=str)
def test_absurd_sizes_are_refused_without_being_allocated(folder, sizes):
    edit(folder / CONFIG, **sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(folder)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 200 * 1024


@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "3", "null", '{"a": ' * 100_000, "\x00\x01", '{"format": ' + "9" * 5000 + "}", "{'a': 1}\n\n{"],
    ids=lambda text: text[:12],
)
def test_what_is_not_a_json_object_is_refused(folder, name, text):
    (folder / name).write_text(text)
    assert name in refusal(folder)


def test_json_of_another_encoding_or_size_is_refused(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe{\x00}\x00")
    assert CONFIG in refusal(folder)
    with (folder / CONFIG).open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert str(MAX_JSON_BYTES) in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"stranger": 1},
        {"target": {"stranger": 1}},
        {"target": {"channels": -1}},
        {"target": {"channels": "8"}},
        {"target": {"scale": None}},
        {"target": 3},
        {"target": False},
        {"target": []},
        {"training": 3},
        {"classes": "abc"},
        {"classes": [1]},
        {"guidance_scale": 10**400},
        {"x" * 5000: 1},
        {"classes": 3},
        {"null_label": 4},
        {"null_label": "3"},
        {"crop": -1},
        {"crop": 4},
        {"crop": "1"},
        {"guidance_scale": "2"},
        {"guidance_scale": float("nan")},
        {"classes": ["a"] * 5},
        {"path": 3},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(folder, changes):
    edit(folder / MANIFEST, **changes)
    assert MANIFEST in refusal(folder)


def test_readers_refuse_what_does_not_exist(tmp_path):
    for read in (read_json, read_tensors):
        with pytest.raises(ArtifactError, match="no such file"):
            read(tmp_path / "nothing")
