"""Measured orders of solvers: Gaussian data, every kind of path, and the exact answer to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.sampling.analytic import Gaussian, Oracle
from fastdiff.sampling.denoiser import NetworkDenoiser
from fastdiff.sampling.grid import Grid, Times
from fastdiff.sampling.loop import sample
from fastdiff.sampling.path import EDM, OrnsteinUhlenbeck, Path, RectifiedFlow, linear_betas
from fastdiff.sampling.prediction import Prediction
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.table import build

PATHS: dict[str, Path] = {
    "straight": RectifiedFlow(),
    "vp": linear_betas(),
    "edm": EDM(sigma_max=10.0),
    "ou": OrnsteinUhlenbeck(),
}


def gaussian() -> Gaussian:
    """Pixels of different mean and width, so that no solver is exact by symmetry."""
    return Gaussian(
        torch.linspace(-0.6, 0.8, 12, dtype=torch.float64).view(1, 3, 4),
        torch.linspace(0.3, 1.2, 12, dtype=torch.float64).view(1, 3, 4),
    )


def smooth_times(path: Path, n: int) -> Times:
    """``n`` steps that are smooth in log-SNR and stay away from both ends, where orders are cleanly seen."""
    return tuple(path.time(-1.5 + 3.0 * i / n) for i in range(n + 1))


def graded_times(path: Path, n: int) -> Times:
    """The same, its first step cut into ever shorter ones, so that a multistep method starts at its full order.

    A multistep solver begins with first-order steps, whose error alone is of second order in their length.
    """
    fractions = [0.0] + [2.0 ** -(12 - k) for k in range(12)]
    return tuple(path.time(-1.5 + 3.0 * f / n) for f in fractions) + smooth_times(path, n)[1:]


def run(path: Path, prediction: Prediction, solver: Solver, times: Times, x: Tensor) -> Tensor:
    """Sample in float64 with the exact network."""
    table = build(path, prediction, solver, times, dtype=torch.float64)
    oracle = Oracle(gaussian(), path, prediction, [solver.rows(path, times)])
    return sample(NetworkDenoiser(oracle), x, table, None, None)


def error(path: Path, prediction: Prediction, solver: Solver, n: int, grid: Grid = smooth_times) -> float:
    """Largest distance to the exact solution after ``n`` steps."""
    times = grid(path, n)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    truth = gaussian().flow(path, x, times[0], times[-1])
    return float((run(path, prediction, solver, times, x) - truth).abs().max())


def measured_order(path: Path, prediction: Prediction, solver: Solver) -> float:
    """Slope of log error over log n, between n = 128 and 512 (coarse grids lie)."""
    sizes = (128, 512)
    grid = graded_times if solver.order > 2 else smooth_times
    errors = [error(path, prediction, solver, n, grid) for n in sizes]
    return math.log(errors[0] / errors[1]) / math.log(sizes[1] / sizes[0])
