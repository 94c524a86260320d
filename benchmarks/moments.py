"""Solvers that add noise, measured without sampling: Gaussian data stay Gaussian.

The denoised estimate is affine in the state, so every register is a constant plus weights on independent unit normals:
the starting state's and one for each draw. Carrying those coefficients through a solver's rows gives mean and variance
of its result exactly; a draw that two rows share, or that a register remembers, is one variable wherever it appears.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.benchmarks import walk
from fastdiff.benchmarks.orders import BETWEEN, Order, fit
from fastdiff.sampling.analytic import Gaussian, Oracle
from fastdiff.sampling.denoiser import NetworkDenoiser
from fastdiff.sampling.grid import Times
from fastdiff.sampling.loop import sample
from fastdiff.sampling.noise import PhiloxNoise
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import PREDICTIONS, first_order
from fastdiff.sampling.solvers import Row, Solver
from fastdiff.sampling.table import build

SIZES = (32, 64, 128, 256)
FLOOR = 1e-12


@functools.cache
def gaussian() -> Gaussian:
    """Four independent pixels of different mean and width."""
    return Gaussian(
        torch.tensor([0.7, -0.4, 0.1, 1.2], dtype=torch.float64).view(1, 1, 4),
        torch.tensor([0.3, 0.6, 0.9, 1.3], dtype=torch.float64).view(1, 1, 4),
    )


def marginal(path: Path, t: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of every pixel at ``t``, ``[N]`` each."""
    alpha, sigma = path.alpha_sigma(t)
    return alpha * gaussian().mean.flatten(), gaussian().variance(alpha, sigma).flatten()


def _estimate(path: Path, x: Tensor, row: Row) -> Tensor:
    """D of coefficients ``[1 + variables, N]``, the constant first: for jumps, what makes the step land on the flow."""
    data = gaussian()
    mean, std = data.mean.flatten(), data.std.flatten()
    alpha, sigma = path.alpha_sigma(row.t)
    if row.s == row.t:
        gain = alpha * std**2 / ((alpha * std) ** 2 + sigma**2)
        offset = mean - gain * alpha * mean
    else:
        r, m = first_order(path, row.t, row.s)
        (start, wide), (end, narrow) = marginal(path, row.t), marginal(path, row.s)
        stretch = (narrow / wide).sqrt()
        gain, offset = (stretch - r) / m, (end - stretch * start) / m
    estimate = gain * x
    estimate[0] += offset
    return estimate


def propagate(path: Path, solver: Solver, times: Times) -> tuple[Tensor, Tensor]:
    """Mean and variance of every pixel of the result, ``[N]`` each, from the exact marginal at the start."""
    rows = solver.rows(path, times)
    draws = 1 + max((draw for row in rows for draw in row.draws if draw is not None), default=-1)
    mean, variance = marginal(path, times[0])
    x = torch.zeros(2 + draws, len(mean), dtype=torch.float64)
    x[0], x[1] = mean, variance.sqrt()

    def draw(number: int) -> Tensor:
        unit = torch.zeros_like(x)
        unit[2 + number] = 1.0
        return unit

    *_, last = walk.walk(rows, x, solver.history, lambda state, row: _estimate(path, state, row), draw)
    return last.x[0], last.x[1:].square().sum(0)


def times_of(path: Path, grid: str, n: int) -> Times:
    """``n`` steps of a grid of ``orders.BETWEEN``."""
    return tuple(path.time(-BETWEEN[grid](k / n)) for k in range(n + 1))


def moment_error(path: Path, solver: Solver, grid: str, n: int) -> float:
    """Largest difference of mean or variance to the exact marginal at the end, relative to its variance or width."""
    times = times_of(path, grid, n)
    got, exact = propagate(path, solver, times), marginal(path, times[-1])
    return float(max(((got[0] - exact[0]) / exact[1].sqrt()).abs().max(), (got[1] / exact[1] - 1).abs().max()))


def weak_order(path: Path, solver: Solver, grid: str, sizes: Sequence[int] = SIZES) -> Order:
    """Measure the order at which mean and variance converge; infinite for solvers that are exact in both."""
    return fit(sizes, [moment_error(path, solver, grid, n) for n in sizes], FLOOR)


def monte_carlo(path: Path, solver: Solver, steps: int = 6, count: int = 40_000) -> float:
    """Run the loop and compare with ``propagate``: the largest difference of a mean or variance, in standard errors.

    Eight numbers are compared: for a correct sampler the largest is rarely above 3.
    """
    times = times_of(path, "karras", steps)
    mean, variance = propagate(path, solver, times)
    first, wide = marginal(path, times[0])
    noise = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    x = (first + wide.sqrt() * noise).view(count, 1, 1, 4)
    rows = solver.rows(path, times)
    prediction = PREDICTIONS["direct_map" if any(row.s != row.t for row in rows) else "x0"]
    oracle = Oracle(gaussian(), path, prediction, [rows])
    table = build(path, prediction, solver, times, dtype=torch.float64)
    seeds = PhiloxNoise(torch.arange(count))
    drawn = sample(NetworkDenoiser(oracle), x, table, seeds, None).reshape(count, 4)
    of_mean = (drawn.mean(0) - mean) / (variance / count).sqrt()
    of_variance = (drawn.var(0) / variance - 1) / (2 / (count - 1)) ** 0.5
    return float(torch.cat([of_mean, of_variance]).abs().max())
