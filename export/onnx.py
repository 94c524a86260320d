"""UNet to ONNX, one evaluation or a whole sampler, with a manifest beside the file."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fastdiff.artifact import Manifest, save_manifest
from fastdiff.errors import ArtifactError, PlanError, ShapeError
from fastdiff.export.parity import measure
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import sha256
from fastdiff.models.unet import UNet
from fastdiff.models.weights import Model, fingerprint
from fastdiff.sampling.denoiser import CallableNetwork, Cond
from fastdiff.sampling.loop import sample
from fastdiff.sampling.parts import initial_scale, make_solver, make_times, plan
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.prediction import PREDICTIONS
from fastdiff.sampling.table import StepTable, build

OPSET = 20
EXAMPLE_BATCH = 2  # any size above 1: the exporter would take 1 for a constant


class OneEvaluation(nn.Module):
    """The UNet under the input names the field uses."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """See ``UNet.forward``."""
        return self.unet(sample, timestep, class_labels, target)


class WholeSampler(nn.Module):
    """A deterministic sampler with its network, run by the project's loop: noise and labels in, images out."""

    def __init__(self, unet: UNet, table: StepTable, two_time: bool, scale: float, null_label: int | None, crop: int):
        super().__init__()
        self.unet, self.table, self.scale, self.null_label, self.crop = unet, table, scale, null_label, crop
        self.network = CallableNetwork(self._call, two_time)
        # long names: the exporter gives plain ones, such as `index`, to results, and refuses a clash
        self.table_values = nn.Buffer(table.values)
        self.table_index = nn.Buffer(table.index)

    def _call(self, x: Tensor, timestep: Tensor, target: Tensor | None = None, class_labels: Tensor | None = None):
        return self.unet(x, timestep, class_labels, target)

    def forward(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``noise [B, C, H, W]`` standard normal, ``class_labels [B]`` -> images ``[B, C, H', W']``."""
        table = StepTable(self.table_values, self.table_index, self.table.structure)
        uncond = None
        if self.null_label is not None and class_labels is not None:
            uncond = Cond(torch.full_like(class_labels, self.null_label))
        denoiser, prepared = plan(self.network, Cond(class_labels), uncond, table)
        x = sample(denoiser, noise * self.scale, table, None, prepared)
        return (x[..., self.crop : -self.crop, self.crop : -self.crop] if self.crop else x).clamp(-1, 1)


def export_unet(model: Model, file: str | os.PathLike[str]) -> Manifest:
    """Export one network evaluation with a dynamic batch.

    Args:
        model: loaded from a folder, float32.
        file: where to write; ``<file>.json`` gets the manifest. Both appear whole or not at all.

    Returns:
        The manifest, with a parity report against the torch original.

    Raises:
        ArtifactError: if the exporter fails or its file does not reproduce the original.
    """
    config, info = model.network.config, model.info
    _need_plain(config)
    shape = (EXAMPLE_BATCH, config.in_channels, config.sample_size, config.sample_size)
    arguments: dict[str, Tensor] = {"sample": torch.randn(shape), "timestep": torch.tensor([900.0, 300.0])}
    if config.num_class_embeds:
        arguments["class_labels"] = torch.tensor([0, config.num_class_embeds - 1])
    if info.target is not None:
        arguments["target"] = torch.tensor([400.0, 300.0])
    return _export(model, OneEvaluation(model.network), arguments, "output", Path(file), "unet", {})


def export_sampler(
    model: Model,
    file: str | os.PathLike[str],
    num_inference_steps: int,
    sampler: str | None = None,
    guidance_scale: float | None = None,
) -> Manifest:
    """Export a whole sampler as one graph, for runtimes that only know how to run a graph.

    Args:
        model: loaded from a folder, float32.
        file: where to write.
        num_inference_steps: steps unrolled into the graph.
        sampler: a deterministic one; by default ``flow_map`` for flow maps, else ``dpmpp_2m``.
        guidance_scale: by default the model's own.

    Raises:
        PlanError: if the sampler draws noise.
        ArtifactError: as ``export_unet``.
    """
    config, info = model.network.config, model.info
    _need_plain(config)
    if num_inference_steps > 1000:
        raise PlanError(f"num_inference_steps is {num_inference_steps}; at most 1000 are unrolled into one graph")
    path, prediction = PATHS[info.path](), PREDICTIONS[info.prediction]
    name = sampler or ("flow_map" if prediction.two_time else "dpmpp_2m")
    strength = info.guidance_scale if guidance_scale is None else guidance_scale
    times = make_times(path, num_inference_steps)
    table = build(path, prediction, make_solver(name, {}), times, guidance=strength)
    if table.structure.draws:
        raise PlanError(f"sampler {name!r} draws noise at its steps; only deterministic samplers fit into one graph")
    scale = initial_scale(path, times[0])
    module = WholeSampler(model.network, table, prediction.two_time, scale, info.null_label, info.crop)
    shape = (EXAMPLE_BATCH, config.in_channels, config.sample_size, config.sample_size)
    arguments: dict[str, Tensor] = {"noise": torch.randn(shape)}
    if config.num_class_embeds:
        arguments["class_labels"] = torch.tensor([1, 0])
    facts = {"name": name, "num_inference_steps": num_inference_steps, "guidance_scale": strength}
    return _export(model, module, arguments, "images", Path(file), "sampler", facts)


def _need_plain(config: UNetConfig) -> None:
    """Refuse what cannot be exported.

    Raises:
        PlanError: naming it.
    """
    if config.conditional or config.sample_size is None:
        raise PlanError("only networks without text, whose config has a sample_size, are exported so far")


def _export(
    model: Model,
    module: nn.Module,
    arguments: dict[str, Tensor],
    output: str,
    file: Path,
    kind: str,
    facts: dict[str, Any],
) -> Manifest:
    if model.folder is None:
        raise ArtifactError("export needs a model that was loaded from a folder, so that its hash can be recorded")
    if file.is_dir():
        raise ArtifactError(f"{file}: is a folder; give the name of a file")
    if any(size < 1 for value in arguments.values() for size in value.shape):
        raise ShapeError("an example input is empty")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        _write(module.eval(), arguments, output, temporary)
        proto = onnx.load(temporary)
        onnx.checker.check_model(proto)
        report = measure(module, temporary, arguments)
        manifest = Manifest(
            kind=kind,
            sha256=sha256(temporary),
            model_sha256=fingerprint(model.folder),
            inputs=_signature(proto.graph.input),
            outputs=_signature(proto.graph.output),
            opset=max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
            versions={"torch": torch.__version__, "onnx": onnx.__version__},
            sampler=facts,
            parity=report,
        )
        temporary.replace(file)
        try:
            save_manifest(file, manifest)
        except BaseException:
            file.unlink(missing_ok=True)  # without its manifest no backend would take it
            raise
    finally:
        temporary.unlink(missing_ok=True)
    return manifest


def _write(module: nn.Module, arguments: dict[str, Tensor], output: str, file: Path) -> None:
    """Run the torch.export-based exporter; its chatter is kept away from the user's terminal."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                kwargs=arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(arguments),
                output_names=[output],
                dynamic_shapes={name: {0: batch} for name in arguments},
                verbose=False,
            )
        program.save(str(file), external_data=False)
    except Exception as error:  # the exporter raises many kinds; whichever it is, the user gets one line
        line = " ".join(str(error).split())
        raise ArtifactError(f"the ONNX exporter failed: {type(error).__name__}: {line[:300]}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _signature(entries: Any) -> dict[str, Any]:
    result = {}
    for entry in entries:
        kind = entry.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
        result[entry.name] = [onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape]
    return result
