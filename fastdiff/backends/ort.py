"""onnxruntime, behind the same loop as every other backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.artifact import Manifest, load_manifest
from fastdiff.backends.base import Spec
from fastdiff.backends.eager import CONCAT, TOKENS, Prepared, laid_out
from fastdiff.backends.ort_adapters import adapt
from fastdiff.backends.ort_session import Runner, open_session
from fastdiff.errors import ArtifactError, BackendError, PlanError
from fastdiff.models.lora import Lora
from fastdiff.models.unet import TokenPair
from fastdiff.models.weights import Model, fingerprint
from fastdiff.sampling.denoiser import Cond

FILE = "unet.onnx"


class Inputs(NamedTuple):
    """Prepared for a graph that computes everything at each step."""

    times: Tensor  # [1 or places, R, 2]
    told: dict[str, Tensor]  # conditioning by the names of the graph's inputs, by place
    concat: Tensor | None


def _joined(x: Tensor, concat: Tensor | None) -> Tensor:
    """What the first convolution reads: the scaled state and, behind it, channels that no path scales."""
    return x if concat is None else torch.cat([x, concat[: x.shape[0]].to(x.dtype)], dim=1)


def _control(residuals: Sequence[Tensor], runner: Runner) -> dict[str, Tensor]:
    """ControlNets' residuals by the names of the graph's inputs.

    Raises:
        PlanError: if the graph was exported without them.
    """
    found = [name for name in runner.inputs if name.startswith("control_")]
    if residuals and not found:
        raise PlanError("this exported graph takes no ControlNet: export it with --control")
    if not residuals and found:
        raise PlanError("this exported graph needs a ControlNet's residuals: export it without --control")
    return dict(zip(found, residuals, strict=True))


class WholeNetwork:
    """One graph for a whole evaluation."""

    dtype = torch.float32  # of what it is given

    def __init__(self, runner: Runner):
        self.runner = runner

    def prepare(self, cond: Cond, times: Tensor) -> Inputs:
        """See ``Network.prepare``."""
        laid_out(TOKENS in self.runner.inputs, cond, times[:, :1])  # for its checks
        told = dict(cond.extra or {}) | ({} if cond.label is None else {"class_labels": cond.label})
        return Inputs(times.float(), told, told.pop(CONCAT, None))

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Inputs, control: Sequence[Tensor] = ()) -> Tensor:
        """See ``Network.__call__``; ``control``: of ``UNet.trunk``."""
        batch, times = x.shape[0], prepared.times
        told = times[0, row_index] if times.shape[0] == 1 else times[torch.arange(batch, device=x.device), row_index]
        given = {name: value[:batch] for name, value in prepared.told.items()}
        given |= {"timestep": told[:, 0].expand(batch), "target": told[:, 1].expand(batch)}
        given |= _control(control, self.runner) | {"sample": _joined(x, prepared.concat)}
        return self.runner(given)["output"].to(x.device)


class SplitNetwork:
    """Two graphs: one computes once what does not change, the other the rest, at each step."""

    dtype = torch.float32

    def __init__(self, once: Runner, step: Runner):
        self.once, self.step = once, step
        self.pairs = sum(name.startswith("keys_") for name in once.outputs)

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``; each different conditioning is embedded once."""
        extra = dict(cond.extra or {})
        told = laid_out(TOKENS in self.once.inputs, cond, times)
        given = told.parts | {"timestep": told.times[:, 0], "target": told.times[:, 1]}
        if TOKENS in extra:
            given[TOKENS] = extra[TOKENS]
        found = self.once(given)
        rows = found["time_rows"]
        contexts = tuple((found[f"keys_{i}"], found[f"values_{i}"]) for i in range(self.pairs))
        return Prepared(rows.view(-1, times.shape[1], rows.shape[1]), told.place, contexts, extra.get(CONCAT))

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared, control: Sequence[Tensor] = ()) -> Tensor:
        """See ``Network.__call__``; ``control``: of ``UNet.trunk``."""
        rows, contexts = prepared.at(row_index.to(prepared.place.device))
        return self.trunk(_joined(x, prepared.concat), rows, contexts, control)

    def trunk(
        self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair] = (), control: Sequence[Tensor] = ()
    ) -> Tensor:
        """As ``UNet.trunk``."""
        given = {"sample": x, "time_rows": time_rows.expand(x.shape[0], -1)}
        for i, (keys, values) in enumerate(contexts):
            given |= {f"keys_{i}": keys, f"values_{i}": values}
        return self.step(given | _control(control, self.step))["output"].to(x.device)


OrtNetwork = WholeNetwork | SplitNetwork


def set_adapters(network: OrtNetwork, adapters: Sequence[tuple[Lora, float]]) -> None:
    """Compute with these LoRA adapters and strengths, and no others; see ``adapt``."""
    adapt([network.runner] if isinstance(network, WholeNetwork) else [network.once, network.step], adapters)


def network_from(
    file: Path, device: torch.device, folder: Path | None, variant: str | None = None, graphs: bool = False
) -> OrtNetwork:
    """Open the exported form of a UNet.

    Args:
        file: of ``fastdiff export``, with its manifest and what that names beside it.
        device: where to run it.
        folder: with the weights that it must have been made from; None: not checked.
        variant: of these weights.
        graphs: on a GPU, replay each graph as one CUDA graph.

    Raises:
        ArtifactError: if a file is missing, damaged, holds something else, or was made from other weights.
        BackendError: if onnxruntime cannot run it here.
    """
    if not file.exists():
        source = f"--model {folder} " if folder else ""
        raise ArtifactError(f"{file}: no such file; make it with: fastdiff export {source}--out {file}")
    manifest = load_manifest(file)
    if manifest.kind not in ("unet", "step"):
        raise ArtifactError(f"{file}: holds a {manifest.kind}, which runs by itself; a 'unet' export is needed here")
    if folder is not None and manifest.model_sha256 != fingerprint(folder, variant):
        raise ArtifactError(f"{file}: was made from other weights than those of {folder}; export it again")
    if manifest.dtype == "bfloat16" and device.type == "cpu":
        raise BackendError(f"{file}: computes in bfloat16, which onnxruntime does on a GPU alone; export float32")

    def runner(path: Path) -> Runner:
        return Runner(open_session(path, device, graphs=graphs), device, graphs)

    network: OrtNetwork
    if manifest.kind == "unet":
        network = WholeNetwork(runner(file))
    else:
        network = SplitNetwork(runner(file.with_name(prepare_file(file, manifest))), runner(file))
    set_adapters(network, ())
    return network


def prepare_file(file: Path, manifest: Manifest) -> str:
    """The name of the graph that runs once.

    Raises:
        ArtifactError: if the manifest names none.
    """
    name = f"{file.stem}.prepare{file.suffix}"
    if name not in manifest.files:
        raise ArtifactError(f"{file}: its manifest does not name {name}; export it again")
    return name


def load(model: Model, spec: Spec) -> OrtNetwork:
    """Load the exported form of a model.

    Raises:
        ArtifactError: if the file is missing, damaged, a fused sampler, or made from other weights.
        BackendError: if onnxruntime cannot run it here.
    """
    if model.folder is None:
        raise ArtifactError("backend 'onnxruntime' needs a model that was loaded from a folder")
    return network_from(spec.artifact or model.folder / FILE, spec.device, model.folder)
