"""The UNet in torch, channels-last, with the ops given to it; plain or compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.base import Spec
from fastdiff.errors import ArtifactError, BackendError, PlanError
from fastdiff.kernels import CPU, REFERENCE, Ops, triton_ops
from fastdiff.models.unet import Encoder, TokenPair, UNet
from fastdiff.models.weights import Model
from fastdiff.sampling.denoiser import Cond, Place

EMBEDDED = ("text_embeds", "time_ids", "timestep_cond")  # conditioning that becomes part of the time embedding
TOKENS, CONCAT = "encoder_hidden_states", "concat"
PARTS = (*EMBEDDED, TOKENS, CONCAT)


class Prepared(NamedTuple):
    """What does not depend on the image: for each place, or once for all places that share it."""

    rows: Tensor  # [U, R, P], the time projections of every row
    place: Tensor  # [places] int64, which of the U a place uses
    contexts: tuple[TokenPair, ...]  # keys and values of the text, [places, heads, tokens, d] each
    concat: Tensor | None  # [places, C', H, W], joined to the scaled input (inpainting)

    def at(self, row_index: Tensor) -> tuple[Tensor, list[TokenPair]]:
        """The time rows ``[B, P]`` and contexts of the first ``B`` places, which stand at ``row_index [B]``."""
        batch = row_index.shape[0]
        rows = self.rows[self.place[:batch], row_index]
        return rows, [(keys[:batch], values[:batch]) for keys, values in self.contexts]


def prepare(network: Encoder, cond: Cond, times: Tensor) -> Prepared:
    """Embed the times of every row and the conditioning of every place, each different one once.

    Args:
        network: a UNet, or the part of it that a ControlNet is.
        cond: ``label``, and under diffusers' names ``encoder_hidden_states``, ``text_embeds``, ``time_ids``,
            ``timestep_cond``; ``concat`` holds channels to join to the input.
        times: ``[1 or places, R, 2]``.

    Raises:
        PlanError: naming conditioning that a UNet does not read.
    """
    extra = dict(cond.extra or {})
    told = laid_out(network.config.conditional, cond, times)
    dtype = network.conv_in.weight.dtype
    parts = dict(told.parts)
    embedding = network.embed(told.times[:, 0], parts.pop("class_labels", None), told.times[:, 1], **parts)
    time_rows = network.time_rows(embedding).view(-1, times.shape[1], network.row_width())
    contexts = tuple(network.contexts(extra[TOKENS].to(dtype))) if TOKENS in extra else ()
    return Prepared(time_rows, told.place, contexts, extra.get(CONCAT))


class Told(NamedTuple):
    """What is to be embedded: every row's times with each different conditioning."""

    times: Tensor  # [U * R, 2]
    parts: dict[str, Tensor]  # [U * R, ...] each
    place: Tensor  # [places] int64, which of the U a place uses


def laid_out(conditional: bool, cond: Cond, times: Tensor) -> Told:
    """Lay out what is to be embedded, each different conditioning once; the rest of ``prepare``'s arguments.

    Raises:
        PlanError: naming conditioning that a UNet does not read, or lacks.
    """
    extra = dict(cond.extra or {})
    unknown = sorted(extra.keys() - set(PARTS))
    if unknown:
        raise PlanError(f"conditioning {', '.join(unknown)} is not read by a UNet; allowed: label, {', '.join(PARTS)}")
    if conditional and TOKENS not in extra:
        raise PlanError(f"this network reads text: give {TOKENS}, [B, tokens, width]")
    told = {name: extra[name] for name in EMBEDDED if name in extra} | (
        {} if cond.label is None else {"class_labels": cond.label}
    )
    rows = times.shape[1]
    if told:
        count = len(next(iter(told.values())))
        place, chosen = _different(told, times, count)
    else:
        place, chosen = torch.zeros(times.shape[0], dtype=torch.int64, device=times.device), None
        if times.shape[0] > 1:
            place = torch.arange(times.shape[0], device=times.device)
    kept = times.shape[0] if chosen is None else len(chosen)
    flat = times.expand(kept, -1, -1).reshape(-1, 2)
    parts = {name: value[chosen].repeat_interleave(rows, 0) for name, value in told.items()}
    if not told and TOKENS in extra and times.shape[0] == 1:
        place = place.expand(len(extra[TOKENS]))
    return Told(flat, parts, place)


def _different(told: dict[str, Tensor], times: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return which of the different conditionings each place uses, and a place of each."""
    if times.shape[0] > 1:
        every = torch.arange(count, device=times.device)
        return every, every
    keys = torch.cat([value.reshape(count, -1).double() for value in told.values()], dim=1)
    different, place = keys.unique(dim=0, return_inverse=True)
    first = torch.full((len(different),), count, device=place.device).scatter_reduce(
        0, place, torch.arange(count, device=place.device), "amin"
    )
    return place, first


class UNetNetwork:
    """A ``UNet`` for the loop: times, labels and text are embedded in ``prepare``, only the trunk runs at each step.

    Args:
        unet: on its device.
        trunk: what to call for the trunk; ``unet.trunk``, or a compiled form of it.
        parted: likewise for ``unet.parted``.
        shallow: likewise for ``unet.shallow``.
    """

    def __init__(
        self,
        unet: UNet,
        trunk: Callable[..., Tensor] | None = None,
        parted: Callable[..., tuple[Tensor, Tensor]] | None = None,
        shallow: Callable[..., Tensor] | None = None,
    ):
        self.unet, self.trunk = unet, trunk or unet.trunk
        self._parted, self._shallow = parted or unet.parted, shallow or unet.shallow
        self.branches = len(unet.skips)
        self.dtype = unet.conv_in.weight.dtype

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``; for the conditioning see ``prepare``."""
        return prepare(self.unet, cond, times)

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared, control: Sequence[Tensor] = ()) -> Tensor:
        """See ``Network.__call__``; ``control``: of ``UNet.trunk``."""
        x = self.joined(x, prepared)
        return self.trunk(x, *prepared.at(row_index), control).float()

    def parted(self, x: Tensor, row_index: Tensor, prepared: Prepared, branch: int) -> tuple[Tensor, Tensor]:
        """See ``Caching.parted``."""
        out, deep = self._parted(self.joined(x, prepared), *prepared.at(row_index), branch)
        return out.float(), deep

    def shallow(self, x: Tensor, row_index: Tensor, prepared: Prepared, branch: int, deep: Tensor) -> Tensor:
        """See ``Caching.shallow``."""
        return self._shallow(self.joined(x, prepared), *prepared.at(row_index), branch, deep).float()

    def forget(self) -> None:
        """Drop what was made for the weights as they lie: they are about to move. Nothing here."""

    def gather(self, places: Sequence[Place]) -> Prepared:
        """See ``Gathering.gather``."""
        rows = [p.prepared.rows[p.prepared.place[p.place : p.place + 1], p.row] for p in places]
        pairs = zip(*(p.prepared.contexts for p in places), strict=True)
        contexts = tuple(
            (_side_by_side(places, [k for k, _ in pair]), _side_by_side(places, [v for _, v in pair])) for pair in pairs
        )
        extra = [p.prepared.concat for p in places]
        concat = None if extra[0] is None else _side_by_side(places, extra)
        index = torch.arange(len(places), device=rows[0].device)
        return Prepared(torch.cat(rows)[:, None], index, contexts, concat)

    def joined(self, x: Tensor, prepared: Prepared) -> Tensor:
        """What the first convolution reads: the scaled state and, behind it, channels that no path scales."""
        if prepared.concat is not None:
            x = torch.cat([x, prepared.concat[: x.shape[0]].to(x.dtype)], dim=1)
        return x.to(self.dtype, memory_format=torch.channels_last)


def _side_by_side(places: Sequence[Place], parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part[p.place : p.place + 1] for p, part in zip(places, parts, strict=True)])


def place(model: Model, spec: Spec) -> UNet:
    """The model's UNet where and as it is to run."""
    checked_device(spec.device)
    if spec.artifact is not None:
        raise ArtifactError(f"an exported file ({spec.artifact}) belongs to backend 'onnxruntime', not to torch")
    unet = model.network.to(spec.device, spec.dtype, memory_format=torch.channels_last)
    unet.ops = ops_for(spec.device)
    return unet


def checked_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        BackendError: if it is not.
    """
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device is 'cuda', but torch sees no GPU here; allowed: 'cpu'")
    return place


def ops_for(device: torch.device) -> Ops:
    """The kernels of a device."""
    return triton_ops() if device.type == "cuda" else CPU


def load_compiled(model: Model, spec: Spec) -> UNetNetwork:
    """Load with ``torch.compile``; each batch size is compiled when it is first seen.

    Raises:
        BackendError: on a CPU without a C++ compiler.
    """
    if spec.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise BackendError("backend 'compile' needs a C++ compiler (g++ or clang++) on the CPU; none was found")
    unet = place(model, spec)
    unet.ops = REFERENCE  # the compiler fuses plain torch itself
    trunk, parted, shallow = (torch.compile(part, dynamic=False) for part in (unet.trunk, unet.parted, unet.shallow))
    return UNetNetwork(unet, trunk, parted, shallow)
