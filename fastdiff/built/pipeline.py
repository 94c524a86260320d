"""Images from a built folder: the step tables walked by the loop, or one graph that holds the whole walk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.artifact import load_manifest
from fastdiff.backends.ort import network_from
from fastdiff.backends.ort_session import Runner, open_session
from fastdiff.built.folder import FUSED, TABLES, Folder, Preset, read_folder
from fastdiff.built.tables import from_json
from fastdiff.errors import ArtifactError, BackendError, PlanError
from fastdiff.images import Output, to_images
from fastdiff.labels import check_labels
from fastdiff.models.files import read_tensors, sha256
from fastdiff.sampling.denoiser import Cond, Network
from fastdiff.sampling.inpaint import check_image
from fastdiff.sampling.loop import sample
from fastdiff.sampling.noise import INITIAL, Noise
from fastdiff.sampling.parts import make_noise, plan
from fastdiff.sampling.table import StepTable

RUNTIMES = ("onnxruntime", "tensorrt")
OUTPUTS = ("pil", "pt", "np")
Draw = Callable[[Tensor, list[int | None], Noise], Tensor]  # starting state, labels, noise -> samples in [-1, 1]


class BuiltPipeline:
    """A built folder on one device. It holds no state between calls: threads may share it.

    Args:
        folder: read by ``read_folder``.
        device: where it runs.
        backend: ``"onnxruntime"`` or ``"tensorrt"``.
    """

    def __init__(self, folder: Folder, device: torch.device, backend: str = "onnxruntime"):
        if backend not in RUNTIMES:
            raise BackendError(f"backend is {backend!r}; a built folder runs on: {', '.join(RUNTIMES)}")
        self.folder, self.device, self.backend = folder, device, backend
        tables = read_tensors(folder.file(TABLES)) if TABLES in folder.files else {}
        opened: dict[str, Any] = {}  # presets may share a graph
        self.runners = {name: self._runner(name, preset, tables, opened) for name, preset in folder.presets.items()}

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        backend: str = "onnxruntime",
        trust: str | None = None,
    ) -> BuiltPipeline:
        """Load what ``fastdiff build`` made.

        Args:
            folder: holds ``built.json``.
            device: ``"cpu"`` or ``"cuda"``.
            backend: ``"onnxruntime"`` or ``"tensorrt"``.
            trust: SHA-256 of ``built.json``, printed by ``fastdiff build``: needed for engines made on another machine.

        Raises:
            ArtifactError: if the folder is damaged, or its engines were made elsewhere and it is not trusted.
            BackendError: if the backend cannot run here.
        """
        return cls(read_folder(Path(folder), trust), torch.device(device), backend)

    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        preset: str | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Output:
        """Draw images.

        Args:
            class_labels: one label, several, or None.
            preset: a name of ``folder.presets``; by default the folder's own.
            num_images_per_prompt: images for each label.
            seed: one for the batch (image ``i`` gets ``seed + i``), or one for each image.
            latents: the starting state instead of noise, ``[B, C, H, W]``.
            output_type: ``"pil"``, ``"pt"`` (``[B, C, H, W]`` in [0, 1]) or ``"np"`` (``[B, H, W, C]`` in [0, 1]).

        Raises:
            PlanError: if there is no such preset or output type.
            ShapeError: on labels, seeds or latents that do not fit the model.
        """
        if output_type not in OUTPUTS:
            raise PlanError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUTS)}")
        labels, name = self.labels(class_labels, num_images_per_prompt), self.folder.preset(preset)
        made, draws = self.folder.presets[name], (self.folder.presets[name].table or {}).get("draws", 0)
        shape = (len(labels), *self.folder.shape)
        noise = make_noise(shape, draws, seed, None, self.device, initial=latents is None)
        if latents is None:
            number = torch.full((shape[0],), INITIAL, dtype=torch.int64, device=self.device)
            x = made.scale * noise.draw(number, torch.empty(shape, device=self.device))
        else:
            check_image("latents", latents, shape)
            x = latents.to(self.device, torch.float32)
        images = self.runners[name](x, labels, noise)
        return Output(to_images(images, 0 if made.kind == FUSED else self.folder.crop, output_type))

    def labels(self, class_labels: int | Sequence[int] | None, repeat: int = 1) -> list[int | None]:
        """See ``check_labels``."""
        made = self.folder
        return check_labels(class_labels, repeat, len(made.classes), made.null_label, made.labelled)

    def _runner(self, name: str, preset: Preset, tables: Mapping[str, Tensor], opened: dict[str, Any]) -> Draw:
        if preset.graph not in opened:
            opened[preset.graph] = self._open(preset)
        run = opened[preset.graph]
        if preset.kind == FUSED:
            return lambda x, labels, _: run(x / preset.scale, self._cond(labels).label)  # the graph scales by itself
        if name not in tables:
            raise ArtifactError(f"{self.folder.root / TABLES}: holds no table {name!r}")
        table = from_json(preset.table or {}, tables[name], f"preset {name!r}")
        table = StepTable(table.values.to(self.device), table.index.to(self.device), table.structure)
        return lambda x, labels, noise: self._walk(run, table, x, labels, noise)

    @torch.no_grad()
    def _walk(self, network: Network, table: StepTable, x: Tensor, labels: list[int | None], noise: Noise) -> Tensor:
        guided = any(row.guided for row in table.structure.rows)
        uncond = self._cond([self.folder.null_label] * len(labels)) if guided else None
        denoiser, prepared = plan(network, self._cond(labels), uncond, table)
        return sample(denoiser, x, table, noise, prepared)

    def _cond(self, labels: Sequence[int | None]) -> Cond:
        return Cond(torch.tensor(labels, dtype=torch.int64, device=self.device)) if self.folder.labelled else Cond()

    def _open(self, preset: Preset) -> Any:
        if self.backend == "tensorrt":
            return self._engine(preset)
        file, _ = self.folder.file(preset.graph), self.folder.file(f"{preset.graph}.json")
        if preset.kind == FUSED:
            load_manifest(file)  # checks what lies beside the graph too
            return _fused(Runner(open_session(file, self.device), self.device))
        return network_from(file, self.device, None)

    def _engine(self, preset: Preset) -> Any:
        from fastdiff.backends.trt import architecture_of, load_engine, load_network

        here = architecture_of(self.device)
        if here not in preset.plans:
            built = ", ".join(preset.plans) or "no GPU"
            raise BackendError(f"{self.folder.root}: has engines for {built}; this GPU is {here}: use 'onnxruntime'")
        file = self.folder.file(preset.plans[here])
        manifest = sha256(self.folder.file(f"{preset.plans[here]}.json"))
        trusted = [manifest] if self.folder.trusted else []
        if preset.kind == FUSED:
            return _fused(load_engine(file, self.device, trusted))
        return load_network(file, self.device, trusted=trusted)


def _fused(run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A fused sampler: standard normal noise ``[B, C, H, W]`` and labels ``[B]`` -> samples in [-1, 1], cropped."""
    return lambda noise, label: run({"noise": noise} if label is None else {"noise": noise, "class_labels": label})[
        "images"
    ]
