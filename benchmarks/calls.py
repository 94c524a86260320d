"""The bundled model's loop and one call of its network, made ready: calling them is the work and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels import REFERENCE, Ops
from fastdiff.models.unet import UNet
from fastdiff.pipeline import Pipeline
from fastdiff.sampling.denoiser import Cond, Denoiser, Network, Prepared
from fastdiff.sampling.grid import explicit
from fastdiff.sampling.loop import sample
from fastdiff.sampling.noise import Noise
from fastdiff.sampling.parts import make_noise, make_times, plan, start
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.table import StepTable, build

MODEL = "digits"
ROW = 1  # of a flow map's table of four rows: neither pure noise nor nearly clean


class Loop(NamedTuple):
    """Everything one run of the loop takes, made beforehand: calling it is the loop and nothing else."""

    denoiser: Denoiser
    x: Tensor  # [B, C, H, W]
    table: StepTable
    noise: Noise
    prepared: Prepared
    ops: Ops

    def __call__(self) -> Tensor:
        """Run the loop: ``[B, C, H, W]``."""
        return sample(*self)


def make_loop(
    pipe: Pipeline,
    solver: str,
    steps: int | Sequence[float],
    batch: int,
    ops: Ops = REFERENCE,
    network: Network | None = None,
) -> Loop:
    """Plan a loop over a loaded model, without guidance; image ``i`` is of class ``i % 10`` and has seed ``i``.

    Args:
        pipe: gives path, prediction, sizes and device.
        solver: a name of ``SOLVERS``.
        steps: of the usual grid; or the times themselves.
        batch: images.
        ops: kernels of the loop; those of the network are the network's.
        network: another one than that of ``pipe``.
    """
    config, device = pipe.model.network.config, pipe.device
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    times = make_times(pipe.path, steps) if isinstance(steps, int) else explicit(pipe.path, steps)
    table = build(pipe.path, pipe.prediction, SOLVERS[solver](), times, device=device)
    label = torch.arange(batch, device=device) % len(pipe.model.info.classes)
    with torch.no_grad():
        denoiser, prepared = plan(network or pipe.network, Cond(label), None, table)
    noise = make_noise(shape, table.structure.draws, 0, None, device, initial=True)
    return Loop(denoiser, start(pipe.path, times, shape, None, None, noise, device), table, noise, prepared, ops)


def one_call(network: Network, loop: Loop, batch: int) -> Callable[[], Tensor]:
    """Return one evaluation of a network as the loop makes it; times and labels were prepared beforehand."""
    row_index = loop.table.index[ROW].expand(batch)
    return lambda: network(loop.x, row_index, loop.prepared)


def exact_unet(unet: UNet) -> UNet:
    """A float64 copy in plain torch, the truth that errors are measured from."""
    exact = copy.deepcopy(unet).double()
    exact.ops = REFERENCE
    return exact


@torch.no_grad()
def exact_call(exact: UNet, loop: Loop, labels: Tensor) -> Tensor:
    """The same evaluation in float64: ``[B, C, H, W]``."""
    told = loop.table.times[ROW].double().expand(len(labels), 2)
    return exact(loop.x.double(), told[:, 0], labels, told[:, 1])
