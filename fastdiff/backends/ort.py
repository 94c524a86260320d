"""onnxruntime, behind the same loop as every other backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.artifact import load_manifest
from fastdiff.backends.base import Spec
from fastdiff.errors import ArtifactError, BackendError
from fastdiff.models.weights import Model, fingerprint
from fastdiff.sampling.denoiser import Cond

FILE = "unet.onnx"


class Inputs(NamedTuple):
    """Prepared: the table's times and the labels, by place, on the host."""

    times: Any  # numpy [1 or places, R, 2]
    labels: Any | None


def open_session(file: Path, device: torch.device, threads: int | None = None) -> Any:
    """Open an ONNX file with onnxruntime.

    Raises:
        BackendError: if onnxruntime is missing, or did not load the provider the device needs (it would otherwise
            fall back to the CPU without a word).
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("backend 'onnxruntime' is not installed: pip install 'fastdiff[onnx]'") from error
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device.type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of every constant that it cannot fold
    if device.type == "cuda":
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"onnxruntime loaded {session.get_providers()} instead of {provider}: pip install onnxruntime-gpu"
        )
    return session


class OrtNetwork:
    """An exported UNet for the loop."""

    def __init__(self, session: Any):
        self.session = session
        self.names = [entry.name for entry in session.get_inputs()]

    def prepare(self, cond: Cond, times: Tensor) -> Inputs:
        """See ``Network.prepare``."""
        return Inputs(times.float().cpu().numpy(), None if cond.label is None else cond.label.cpu().numpy())

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Inputs) -> Tensor:
        """See ``Network.__call__``."""
        batch, index = x.shape[0], row_index.cpu().numpy()
        times = prepared.times
        told = times[0, index] if times.shape[0] == 1 else times[range(batch), index]
        feed = {"sample": x.contiguous().cpu().numpy(), "timestep": told[:, 0]}
        if "target" in self.names:
            feed["target"] = told[:, 1]
        if prepared.labels is not None:
            feed["class_labels"] = prepared.labels[:batch]
        (output,) = self.session.run(None, feed)
        return torch.from_numpy(output).to(x.device)


def load(model: Model, spec: Spec) -> OrtNetwork:
    """Load the exported form of a model.

    Raises:
        ArtifactError: if the file is missing, damaged, a fused sampler, or made from other weights.
        BackendError: if onnxruntime cannot run it here.
    """
    if model.folder is None:
        raise ArtifactError("backend 'onnxruntime' needs a model that was loaded from a folder")
    file = spec.artifact or model.folder / FILE
    if not file.exists():
        raise ArtifactError(f"{file}: no such file; make it with: fastdiff export --model {model.folder} --out {file}")
    manifest = load_manifest(file)
    if manifest.kind != "unet":
        raise ArtifactError(f"{file}: holds a {manifest.kind}, which runs by itself; a 'unet' export is needed here")
    if manifest.model_sha256 != fingerprint(model.folder):
        raise ArtifactError(f"{file}: was made from other weights than those of {model.folder}; export it again")
    return OrtNetwork(open_session(file, spec.device))
