"""A model repository for Triton: the server's own fields, read back by protobuf, and a graph that runs as announced."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from small import make_folder

pytest.importorskip("onnx", reason="export needs onnx (pip install 'fastdiff[onnx]')")
pytest.importorskip("onnxruntime", reason="export needs onnxruntime (pip install 'fastdiff[onnx]')")

from fastdiff import Pipeline  # noqa: E402
from fastdiff.artifact import load_manifest, save_manifest  # noqa: E402
from fastdiff.backends.ort import open_session  # noqa: E402
from fastdiff.backends.plan_files import PlanManifest  # noqa: E402
from fastdiff.backends.plan_files import save_manifest as save_plan_manifest  # noqa: E402
from fastdiff.cli import main  # noqa: E402
from fastdiff.errors import ArtifactError, PlanError  # noqa: E402
from fastdiff.export.onnx import export_sampler  # noqa: E402
from fastdiff.export.triton_server import Serving, write_model  # noqa: E402
from fastdiff.models.files import sha256  # noqa: E402
from fastdiff.models.weights import load_model  # noqa: E402

ONE_LEVEL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
# Names, numbers and types of the fields used here, from the server's model_config.proto (release 2.73); *: repeated
ENUMS = {
    "DataType": ("TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 "
                 "TYPE_INT32 TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16"),
    "Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
}  # fmt: skip
MESSAGES = {
    "Reshape": {"shape": (1, "int64*")},
    "Input": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (4, "int64*"), "reshape": (5, "Reshape")},
    "Output": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (3, "int64*"), "reshape": (5, "Reshape")},
    "Latest": {"num_versions": (1, "uint32")},
    "VersionPolicy": {"latest": (1, "Latest")},
    "InstanceGroup": {"name": (1, "string"), "count": (2, "int32"), "kind": (4, "Kind")},
    "DynamicBatching": {"preferred_batch_size": (1, "int32*"), "max_queue_delay_microseconds": (2, "uint64")},
    "ModelConfig": {
        "name": (1, "string"), "platform": (2, "string"), "version_policy": (3, "VersionPolicy"),
        "max_batch_size": (4, "int32"), "input": (5, "Input*"), "output": (6, "Output*"),
        "instance_group": (7, "InstanceGroup*"), "default_model_filename": (8, "string"),
        "dynamic_batching": (11, "DynamicBatching"), "backend": (17, "string"),
    },
}  # fmt: skip


def config_class():
    """The class of a model configuration, made from the table above."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config_test.proto", package="t", syntax="proto3")
    for name, values in ENUMS.items():
        entries = [{"name": value, "number": i} for i, value in enumerate(values.split())]
        file.enum_type.add(name=name, value=[descriptor_pb2.EnumValueDescriptorProto(**e) for e in entries])
    for name, members in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in members.items():
            plain = kind.removesuffix("*")
            added = message.field.add(name=field, number=number)
            added.label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            if plain in ENUMS or plain in MESSAGES:
                added.type = kinds.TYPE_ENUM if plain in ENUMS else kinds.TYPE_MESSAGE
                added.type_name = f".t.{plain}"
            else:
                added.type = getattr(kinds, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


ModelConfig = config_class()


def read(folder):
    """Parse a model's configuration; a field that the server does not know is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """A fused sampler and its model."""
    root = tmp_path_factory.mktemp("triton")
    folder = make_folder(root / "model", two_time=True, **ONE_LEVEL)
    export_sampler(load_model(folder), root / "sampler.onnx", 1)
    return folder, root / "sampler.onnx"


@pytest.fixture
def plan(sampler, tmp_path, monkeypatch):
    """An engine of the sampler, as TensorRT would have made it: the bytes are not one, which nothing here reads."""
    (tmp_path / "user").mkdir(mode=0o700)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "user"))
    file = tmp_path / "sampler.plan"
    file.write_bytes(b"a plan")
    shapes = {"noise": [[1, 1, 8, 8], [2, 1, 8, 8], [4, 1, 8, 8]], "class_labels": [[1], [2], [4]]}
    manifest = PlanManifest(
        sha256(file), 6, "key", "tensorrt", "11.4", ("sm90",), "graph", {"kind": "sampler", "sampler": {}},
        {"noise": ["FLOAT", [-1, 1, 8, 8]], "class_labels": ["INT64", [-1]]}, {"images": ["FLOAT", [-1, 1, 6, 6]]},
        (shapes,),
    )  # fmt: skip
    save_plan_manifest(file, manifest)
    return file, manifest


def test_the_configuration_is_the_servers(sampler, tmp_path):
    serving = Serving(
        max_batch_size=16, preferred_batch_size=(4, 8), max_queue_delay_us=500, instances=2, kind="KIND_GPU"
    )
    folder = write_model(tmp_path, "digits", sampler[1], serving)
    config = read(folder)
    assert (config.name, config.platform, config.max_batch_size) == ("digits", "onnxruntime_onnx", 16)
    assert config.default_model_filename == "model.onnx" and (folder / "1" / "model.onnx").is_file()
    noise, labels = config.input
    assert (noise.name, noise.data_type, list(noise.dims)) == ("noise", 11, [1, 8, 8]) and not noise.HasField("reshape")
    assert (labels.name, labels.data_type, list(labels.dims)) == ("class_labels", 9, [1])
    assert labels.HasField("reshape") and list(labels.reshape.shape) == []  # [batch, 1] outside, [batch] in the graph
    (images,) = config.output
    assert (images.name, images.data_type, list(images.dims)) == ("images", 11, [1, 6, 6])
    batching = config.dynamic_batching
    assert list(batching.preferred_batch_size) == [4, 8] and batching.max_queue_delay_microseconds == 500
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, 1)]
    assert config.version_policy.latest.num_versions == 1


def test_the_graph_runs_as_the_configuration_announces(sampler, tmp_path):
    folder = write_model(tmp_path, "digits", sampler[1], Serving())
    config = read(folder)
    session = open_session(folder / "1" / config.default_model_filename, torch.device("cpu"))
    batch, types = 5, {11: np.float32, 9: np.int64}
    outside = {entry.name: np.ones((batch, *entry.dims), types[entry.data_type]) for entry in config.input}
    outside["noise"] = np.random.default_rng(0).standard_normal(outside["noise"].shape).astype(np.float32)
    # what the server does before it hands a batch on
    feed = {
        entry.name: outside[entry.name].reshape(
            batch, *(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
        )
        for entry in config.input
    }
    (got,) = session.run([config.output[0].name], feed)
    assert got.shape == (batch, *config.output[0].dims)
    pipe = Pipeline.from_pretrained(sampler[0])
    wanted = pipe([1] * batch, latents=torch.from_numpy(feed["noise"]), num_inference_steps=1, output_type="np").images
    assert np.abs(got.transpose(0, 2, 3, 1) / 2 + 0.5 - wanted).max() <= 1e-5


def test_an_engine_of_tensorrt_is_served(plan, tmp_path):
    folder = write_model(tmp_path / "repository", "digits", plan[0], Serving(max_batch_size=4))
    config = read(folder)
    assert config.platform == "tensorrt_plan" and (folder / "1" / "model.plan").read_bytes() == b"a plan"
    assert [(entry.name, entry.data_type, list(entry.dims)) for entry in config.input] == [
        ("noise", 11, [1, 8, 8]), ("class_labels", 9, [1])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "serving", "says"),
    [
        ({"library": "tensorrt_rtx"}, {}, "is an engine of tensorrt_rtx; the server runs those of tensorrt alone"),
        ({}, {"max_batch_size": 5}, "max_batch_size is 5; .* was built for 4 at most"),
        ({"graph": {"kind": "unet"}}, {}, "holds a unet; a fused sampler is needed"),
        ({"sha256": "0" * 64}, {}, "not those its manifest describes"),
    ],
)
def test_an_engine_that_the_server_cannot_run_is_refused(plan, tmp_path, change, serving, says):
    save_plan_manifest(plan[0], replace(plan[1], **change))
    with pytest.raises((PlanError, ArtifactError), match=says):
        write_model(tmp_path / "repository", "digits", plan[0], Serving(**{"max_batch_size": 4, **serving}))
    assert not (tmp_path / "repository").exists()


def test_another_version_lies_beside_the_first(sampler, tmp_path):
    folder = write_model(tmp_path, "digits", sampler[1], Serving())
    write_model(tmp_path, "digits", sampler[1], Serving(), version=2)
    assert sorted(os.listdir(folder)) == ["1", "2", "config.pbtxt"]
    with pytest.raises(ArtifactError, match="2: exists already"):
        write_model(tmp_path, "digits", sampler[1], Serving(), version=2)
    with pytest.raises(ArtifactError, match="describes another model or another way to run it"):
        write_model(tmp_path, "digits", sampler[1], Serving(max_batch_size=1), version=3)
    assert sorted(os.listdir(folder)) == ["1", "2", "config.pbtxt"]


@pytest.mark.parametrize(
    ("name", "serving", "version", "says"),
    [
        ("../digits", {}, 1, "model name is '../digits'"),
        ("", {}, 1, "model name is ''"),
        ("digits", {}, 0, "version is 0"),
        ("digits", {"max_batch_size": 0}, 1, "batch and instances of 1 or more"),
        ("digits", {"preferred_batch_size": (9,)}, 1, r"preferred_batch_size is \[9\]; allowed: 1 to 8"),
        ("digits", {"kind": "KIND_TPU"}, 1, "kind is 'KIND_TPU'"),
    ],
)
def test_what_cannot_be_is_refused(sampler, tmp_path, name, serving, version, says):
    with pytest.raises(PlanError, match=says):
        write_model(tmp_path, name, sampler[1], Serving(**serving), version)
    assert os.listdir(tmp_path) == []


def test_a_graph_of_one_evaluation_is_refused(sampler, tmp_path):
    file = shutil.copy(sampler[1], tmp_path / "unet.onnx")
    save_manifest(tmp_path / "unet.onnx", replace(load_manifest(sampler[1]), kind="unet"))
    with pytest.raises(ArtifactError, match="holds a unet; a fused sampler is needed"):
        write_model(tmp_path / "repository", "digits", tmp_path / "unet.onnx", Serving())
    assert file.exists()


def test_the_command_writes_a_repository(sampler, tmp_path, capsys):
    arguments = ["--model", str(sampler[0]), "--format", "triton-server", "--steps", "1", "--name", "digits"]
    assert main(["build", *arguments, "--out", str(tmp_path / "repository")]) == 0
    assert "digits_flow_map-1" in capsys.readouterr().out
    assert read(tmp_path / "repository" / "digits_flow_map-1").max_batch_size == 8
    assert main(["build", *arguments, "--out", str(tmp_path / "x"), "--engine", "sm86"]) == 2
    assert "the server runs engines of TensorRT alone" in capsys.readouterr().err
