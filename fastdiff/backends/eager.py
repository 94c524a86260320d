"""The UNet in torch, channels-last, with the ops given to it; plain or compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.base import Spec
from fastdiff.errors import ArtifactError, BackendError
from fastdiff.kernels import REFERENCE, triton_ops
from fastdiff.models.unet import UNet
from fastdiff.models.weights import Model
from fastdiff.sampling.denoiser import Cond


class TimeRows(NamedTuple):
    """Prepared: the time projections of every row, once for each different conditioning."""

    rows: Tensor  # [U, R, P]
    place: Tensor  # [places] int64, which of the U a place uses


class UNetNetwork:
    """A ``UNet`` for the loop: times and labels are embedded in ``prepare``, only the trunk runs at each step.

    Args:
        unet: on its device.
        trunk: what to call for the trunk; ``unet.trunk``, or a compiled form of it.
    """

    def __init__(self, unet: UNet, trunk: Callable[[Tensor, Tensor], Tensor] | None = None):
        self.unet, self.trunk = unet, trunk or unet.trunk
        self.dtype = unet.conv_in.weight.dtype

    def prepare(self, cond: Cond, times: Tensor) -> TimeRows:
        """See ``Network.prepare``."""
        places, rows = times.shape[0], times.shape[1]
        labels = cond.label
        if places == 1 and labels is not None:
            different, place = labels.unique(return_inverse=True)
        else:
            different, place = labels, torch.arange(places, device=times.device)
            if labels is None and places == 1:
                place = torch.zeros(1, dtype=torch.int64, device=times.device)
        count = places if different is None else different.shape[0]
        flat = times.expand(count, -1, -1).reshape(-1, 2)
        label = None if different is None else different.repeat_interleave(rows)
        embedding = self.unet.embed(flat[:, 0], label, flat[:, 1])
        return TimeRows(self.unet.time_rows(embedding).view(count, rows, -1), place)

    def __call__(self, x: Tensor, row_index: Tensor, prepared: TimeRows) -> Tensor:
        """See ``Network.__call__``."""
        place = prepared.place[: x.shape[0]]
        x = x.to(self.dtype, memory_format=torch.channels_last)
        return self.trunk(x, prepared.rows[place, row_index]).float()


def _place(model: Model, spec: Spec) -> UNet:
    if spec.device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device is 'cuda', but torch sees no GPU here; allowed: 'cpu'")
    if spec.artifact is not None:
        raise ArtifactError(f"an exported file ({spec.artifact}) belongs to backend 'onnxruntime', not to torch")
    unet = model.network.to(spec.device, spec.dtype, memory_format=torch.channels_last)
    unet.ops = triton_ops() if spec.device.type == "cuda" else REFERENCE
    return unet


def load(model: Model, spec: Spec) -> UNetNetwork:
    """Load into plain torch; on a GPU with the fused Triton kernels."""
    return UNetNetwork(_place(model, spec))


def load_compiled(model: Model, spec: Spec) -> UNetNetwork:
    """Load with ``torch.compile``; each batch size is compiled when it is first seen.

    Raises:
        BackendError: on a CPU without a C++ compiler.
    """
    if spec.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise BackendError("backend 'compile' needs a C++ compiler (g++ or clang++) on the CPU; none was found")
    unet = _place(model, spec)
    unet.ops = REFERENCE  # the compiler fuses plain torch itself
    return UNetNetwork(unet, torch.compile(unet.trunk, dynamic=False))
