"""A whole sampling loop with its network in one CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.backends.eager import Prepared
from fastdiff.backends.flat.trunk import FlatNetwork
from fastdiff.graph import Captured
from fastdiff.kernels import Ops
from fastdiff.models.unet import UNet
from fastdiff.sampling import loop
from fastdiff.sampling.denoiser import Denoiser, NetworkDenoiser
from fastdiff.sampling.noise import Noise, PhiloxNoise
from fastdiff.sampling.table import StepTable, Structure


class LoopNetwork(FlatNetwork):
    """A network that comes with a walk of its own: the whole loop captured, one graph for each structure and shape.

    Another schedule of the same structure, other noise and other conditioning are copies into the graph's memory. Call
    ``walk`` in place of ``sampling.loop.sample``.
    """

    def __init__(self, unet: UNet):
        super().__init__(unet)
        self._inside = NetworkDenoiser(self.plain())
        self._captured = Captured(self._run)
        self.trunk.graphs.append(self._captured)

    @torch.no_grad()
    def walk(
        self, denoise: Denoiser, x: Tensor, table: StepTable, noise: Noise | None, prepared: Prepared, ops: Ops
    ) -> Tensor:
        """See ``sampling.loop.sample``; what no graph here holds (masks, guides, torch's generators) goes there."""
        own = type(denoise) is NetworkDenoiser and denoise.network is self and denoise.guide is None
        if not own or not (noise is None or isinstance(noise, PhiloxNoise)):
            return loop.sample(denoise, x, table, noise, prepared, ops)
        seeds = None if noise is None else noise.seeds
        return self._captured(x, table.values, table.index, table.structure, seeds, prepared, ops)

    def _run(
        self, x: Tensor, values: Tensor, index: Tensor, structure: Structure, seeds: Tensor | None, prepared: Prepared,
        ops: Ops,
    ) -> Tensor:  # fmt: skip
        table = StepTable(values, index, structure)
        noise = None if seeds is None else PhiloxNoise(seeds)
        return loop.sample(self._inside, x, table, noise, prepared, ops)
