"""Pictures of prompts from a built folder: text encoders, UNet and decoder as graphs, samplers as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.arguments import Prompt, listed
from fastdiff.built.folder import STEPS, Folder, Text
from fastdiff.built.graphs import beside, check_runtime, open_engine, open_engines, open_graph, open_network, plan_here
from fastdiff.built.text import Read, Reader, read
from fastdiff.built.walk import OUTPUTS, guided, read_numbers, read_table, starting, walk
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.images import Output, fitting_size, to_images
from fastdiff.sampling.denoiser import Cond
from fastdiff.sampling.guidance import strength_embedding


class BuiltTextToImage:
    """A built folder of a text-to-image model on one device. It holds no state between calls: threads may share it.

    Args:
        folder: read by ``read_folder``.
        device: where it runs.
        backend: ``"onnxruntime"`` or ``"tensorrt"``.
    """

    def __init__(self, folder: Folder, device: torch.device, backend: str = "onnxruntime"):
        check_runtime(backend)
        assert folder.text is not None
        self.folder, self.device, self.text = folder, device, folder.text
        graphs = {preset.graph for preset in folder.presets.values()}
        if len(graphs) != 1 or any(preset.kind != STEPS for preset in folder.presets.values()):
            raise ArtifactError(f"{folder.root}: presets of a text-to-image model share one graph of an evaluation")
        (graph,) = graphs
        plan = plan_here(folder, folder.presets[folder.default].plans, device) if backend == "tensorrt" else None
        self.network = open_network(folder, graph, device) if plan is None else open_engines(folder, plan, device)
        numbers = read_numbers(folder)
        self.tables = {name: read_table(folder, name, numbers, device) for name in folder.presets}

        def opened(name: str) -> Any:
            return open_graph(folder, name, device) if plan is None else open_engine(folder, beside(plan, name), device)

        self.readers = [Reader(folder, words, opened(words.graph), device) for words in self.text.encoders]
        self._decode = opened(self.text.decoder)

    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        preset: str | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Output:
        """Draw pictures.

        Args:
            prompt: what to show; one text, or one for each image.
            negative_prompt: what not to show; one for all, or one for each prompt.
            height: of the result; the model's own unless given.
            width: likewise.
            num_images_per_prompt: images for each prompt.
            preset: a name of ``folder.presets``; by default the folder's own.
            seed: one for the batch (image ``i`` gets ``seed + i``), or one for each image.
            latents: the starting noise, ``[B, C, h, w]``, of variance 1.
            output_type: ``"pil"``, ``"pt"`` (``[B, C, H, W]`` in [0, 1]) or ``"np"`` (``[B, H, W, C]`` in [0, 1]).

        Raises:
            PlanError: if there is no such preset or output type, or on prompts that are no texts.
            ShapeError: on sizes, seeds or latents that do not fit the model.
        """
        if output_type not in OUTPUTS:
            raise PlanError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUTS)}")
        name, size, prompts = self.folder.preset(preset), self._size(height, width), listed(prompt)
        made, table = self.folder.presets[name], self.tables[name]
        batch, grow = len(prompts) * num_images_per_prompt, self.text.grow
        shape = (batch, self.folder.shape[0], size[0] // grow, size[1] // grow)
        scaled = None if latents is None else made.scale * latents
        x, noise = starting(shape, table.structure.draws, made.scale, seed, scaled, self.device)
        cond, uncond = self._conds(prompts, negative_prompt, name, size, num_images_per_prompt)
        found = walk(self.network, table, x, cond, uncond, noise)
        return Output(to_images(self._decode({"latents": found})["images"], 0, output_type))

    def _conds(
        self, prompts: list[str], negative: Prompt | None, preset: str, size: tuple[int, int], repeat: int
    ) -> tuple[Cond, Cond | None]:
        """What a network is told, and what it is guided away from."""
        strong, strength = read(self.readers, prompts), self.folder.presets[preset].guidance_scale
        cond = _cond(strong, self.text, size, repeat, strength)
        if not guided(self.tables[preset]):
            return cond, None
        if negative is None and self.text.zero_empty_prompt:
            zeros = None if strong.pooled is None else torch.zeros_like(strong.pooled)
            weak = Read(torch.zeros_like(strong.tokens), zeros)
        else:
            texts = listed(negative or "")
            if len(texts) not in (1, len(prompts)):
                raise PlanError(f"{len(texts)} negative prompts for {len(prompts)} prompts; needed: one, or as many")
            weak = read(self.readers, texts * (len(prompts) // len(texts)))
        return cond, _cond(weak, self.text, size, repeat, strength)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        grow = self.text.grow
        own = self.folder.shape[1] * grow, self.folder.shape[2] * grow
        return fitting_size((height, width), own, grow)


def _cond(words: Read, text: Text, size: tuple[int, int], repeat: int, strength: float) -> Cond:
    extra = {"encoder_hidden_states": words.tokens.repeat_interleave(repeat, 0)}
    if text.sized:
        if words.pooled is None:
            raise ArtifactError("the folder's text encoders give no pooled state, which its network reads")
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=words.tokens.device)
        extra["text_embeds"] = words.pooled.repeat_interleave(repeat, 0)
        extra["time_ids"] = ids.expand(len(extra["text_embeds"]), -1)
    if text.strength_width is not None:
        strengths = torch.full((len(extra["encoder_hidden_states"]),), strength - 1.0, device=words.tokens.device)
        extra["timestep_cond"] = strength_embedding(strengths, text.strength_width)
    return Cond(None, extra)
