"""From a graph to files: weights one after the other from where they lie in memory, the same bytes each time."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx import TensorProto

from fastdiff.errors import ArtifactError, PlanError
from fastdiff.export.graph import Graph, Weight
from fastdiff.models.files import one_line

LARGE = 1_500_000_000  # bytes of weights from which they get a file of their own; protobuf ends at 2 GiB
LIMIT = 2**31 - 2**24
SMALL = 1024  # bytes: what is not larger stays in the graph, where shape inference reads it
PAGE = 4096  # where weights begin in their file, so that a runtime may map them


def data_name(file: Path) -> str:
    """The name of the file with the weights of a large graph."""
    return f"{file.name}.data"


def write_graph(graph: Graph, file: Path, final: Path, external_data: bool | None = None) -> list[Path]:
    """Write a graph, and where they are many its weights beside it.

    Args:
        graph: complete.
        file: where to write now.
        final: the name that it will have; the graph names its weights' file after it.
        external_data: weights in a file of their own; None: if they are more than ``LARGE`` bytes.

    Returns:
        The files that were written, the graph first.

    Raises:
        PlanError: if the weights do not fit into one file with the graph.
    """
    weights = graph.needed_weights()
    total = sum(weight.nbytes for weight in weights)
    apart = total > LARGE if external_data is None else external_data
    if not apart and total > LIMIT:
        raise PlanError(f"{total} bytes of weights do not fit into one ONNX file; allowed: external data")
    files = [file]
    if apart:
        beside = file.with_name(data_name(file))
        with beside.open("wb") as stream:
            tensors = [_tensor(weight, stream, data_name(final)) for weight in weights]
            stream.flush()
            os.fsync(stream.fileno())
        files.append(beside)
    else:
        tensors = [_tensor(weight) for weight in weights]
    model = graph.proto(tensors, {})
    file.write_bytes(model.SerializeToString(deterministic=True))
    return files


def _tensor(weight: Weight, stream: object = None, location: str = "") -> TensorProto:
    tensor = TensorProto(name=weight.name, data_type=Graph.onnx_type(weight.dtype), dims=weight.shape)
    if stream is None or weight.nbytes <= SMALL:
        tensor.raw_data = bytes(weight.data())
        return tensor
    offset = -(-stream.tell() // PAGE) * PAGE  # type: ignore[attr-defined]
    stream.write(b"\0" * (offset - stream.tell()))  # type: ignore[attr-defined]
    stream.write(weight.data())  # type: ignore[attr-defined]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", weight.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def check(file: Path) -> onnx.ModelProto:
    """Run the checker of onnx and its shape inference, strictly, over a file; return it without its weights.

    Raises:
        ArtifactError: if either objects.
    """
    try:
        onnx.checker.check_model(str(file))
        model = onnx.load(file, load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"the exported graph is not valid: {one_line(error, 300)}") from error
    return model
