"""Images from a built folder: the step tables walked by the loop, or one graph that holds the whole walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.built.folder import FUSED, Folder, Preset
from fastdiff.built.graphs import check_runtime, open_engine, open_engines, open_graph, open_network, plan_here
from fastdiff.built.walk import OUTPUTS, guided, read_numbers, read_table, starting, walk
from fastdiff.errors import PlanError
from fastdiff.images import Output, to_images
from fastdiff.labels import check_labels
from fastdiff.sampling.denoiser import Cond
from fastdiff.sampling.noise import Noise

Draw = Callable[[Tensor, list[int | None], Noise], Tensor]  # starting state, labels, noise -> samples in [-1, 1]


class BuiltPipeline:
    """A built folder on one device. It holds no state between calls: threads may share it.

    Args:
        folder: read by ``read_folder``.
        device: where it runs.
        backend: ``"onnxruntime"`` or ``"tensorrt"``.
    """

    def __init__(self, folder: Folder, device: torch.device, backend: str = "onnxruntime"):
        check_runtime(backend)
        self.folder, self.device, self.backend = folder, device, backend
        tables = read_numbers(folder)
        opened: dict[str, Any] = {}  # presets may share a graph
        self.runners = {name: self._runner(name, preset, tables, opened) for name, preset in folder.presets.items()}

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
        x, noise = starting(shape, draws, made.scale, seed, latents, self.device)
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
        table = read_table(self.folder, name, tables, self.device)

        def draw(x: Tensor, labels: list[int | None], noise: Noise) -> Tensor:
            weak = self._cond([self.folder.null_label] * len(labels)) if guided(table) else None
            return walk(run, table, x, self._cond(labels), weak, noise)

        return draw

    def _cond(self, labels: Sequence[int | None]) -> Cond:
        return Cond(torch.tensor(labels, dtype=torch.int64, device=self.device)) if self.folder.labelled else Cond()

    def _open(self, preset: Preset) -> Any:
        if self.backend == "tensorrt":
            return self._engine(preset)
        if preset.kind == FUSED:
            return _fused(open_graph(self.folder, preset.graph, self.device))
        return open_network(self.folder, preset.graph, self.device)

    def _engine(self, preset: Preset) -> Any:
        plan = plan_here(self.folder, preset.plans, self.device)
        if preset.kind == FUSED:
            return _fused(open_engine(self.folder, plan, self.device))
        return open_engines(self.folder, plan, self.device)


def _fused(run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A fused sampler: standard normal noise ``[B, C, H, W]`` and labels ``[B]`` -> samples in [-1, 1], cropped."""
    return lambda noise, label: run({"noise": noise} if label is None else {"noise": noise, "class_labels": label})[
        "images"
    ]
