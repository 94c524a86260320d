"""Measured orders of solvers.

Two measurements. ``measured_order``: Gaussian data, whose exact answer is known, through the loop itself. ``order_of``:
a two-component mixture, where no solver is exact by linearity, from an exact start, down to the round-off of float64.

The mixture's truth is found in coordinates in which all paths are one: ``z = x / alpha`` against
``v = log(sigma / alpha)``, ``dz/dv = z - D``. Source: Karras et al. 2022, arXiv:2206.00364, eq. 1 and 3 with s = 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.benchmarks import walk
from fastdiff.sampling.analytic import Gaussian, Mixture, Oracle
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


# --- on a mixture, from an exact start ------------------------------------------------------------------------------

FIRST, LAST = 1.5, -1.5  # log(sigma / alpha) at both ends: sigma stays above 0
SIZES = (32, 64, 128, 256, 512)
FINER = (1024, 2048)  # for solvers whose two leading error terms still balance at the sizes above
TOLERANCE = 0.25  # how far below the declared order a measured one may be
ROUND_OFF = 1e-12  # relative errors below this are no longer the method's: some hundred roundings of 1e-15 each
BETWEEN: dict[str, Callable[[float], float]] = {  # log(sigma / alpha) at a share u of the way, smooth also beyond 0..1
    "log_snr": lambda u: FIRST + (LAST - FIRST) * u,
    "karras": lambda u: 7.0 * math.log(_mix(math.exp(FIRST / 7), math.exp(LAST / 7), u)),
    "straight time": lambda u: _logit(_mix(_logistic(FIRST), _logistic(LAST), u)),
}


def _mix(first: float, last: float, u: float) -> float:
    return first + (last - first) * u


def _logistic(v: float) -> float:
    return 1.0 / (1.0 + math.exp(-v))


def _logit(p: float) -> float:
    return math.log(p / (1.0 - p))


def mixture() -> Mixture:
    """Two components of different mean, width and weight: nothing cancels by symmetry."""
    means = torch.tensor([[0.9, -0.4, 0.2, 1.1], [-0.7, 0.5, -0.9, 0.3]], dtype=torch.float64)
    widths = torch.tensor([[0.4, 0.6, 0.3, 0.5], [0.7, 0.35, 0.45, 0.25]], dtype=torch.float64)
    return Mixture(means.view(2, 1, 1, 4), widths.view(2, 1, 1, 4), torch.tensor([0.35, 0.65], dtype=torch.float64))


def _start() -> Tensor:
    """States at ``FIRST``, from the marginal there."""
    generator = torch.Generator().manual_seed(5)
    clean = mixture().draw(2, generator)
    return clean + math.exp(FIRST) * torch.randn(clean.shape, dtype=torch.float64, generator=generator)


@functools.cache
def _gauss_legendre(stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, matrix and weights of the implicit Runge-Kutta method of order ``2 * stages``."""
    nodes, weights = np.polynomial.legendre.leggauss(stages)
    c = (nodes + 1) / 2
    powers = np.vander(c, increasing=True)
    integrals = np.stack([c ** (k + 1) / (k + 1) for k in range(stages)], axis=1)
    return c, integrals @ np.linalg.inv(powers), weights / 2


def exact(data: Mixture, z: Tensor, v: float, end: float, longest: float = 0.1) -> Tensor:
    """The ODE of ``data`` from ``v`` to ``end``, to round-off: Gauss-Legendre of order 12 in steps up to ``longest``.

    Source: Hairer, Norsett and Wanner 1993, "Solving Ordinary Differential Equations I", sec. II.7, Kuntzmann-Butcher.
    """

    def slope(z: Tensor, v: float) -> Tensor:
        return z - data.denoised(z, 1.0, math.exp(v))

    c, matrix, weights = (torch.from_numpy(part) for part in _gauss_legendre(6))
    steps = max(1, math.ceil(abs(end - v) / longest))
    h = (end - v) / steps
    for i in range(steps):
        slopes = torch.stack([slope(z, v + i * h)] * len(c))
        for _ in range(60):
            stages = z + h * torch.einsum("ij,j...->i...", matrix, slopes)
            new = torch.stack([slope(stage, v + (i + float(u)) * h) for stage, u in zip(stages, c, strict=True)])
            change, slopes = float((new - slopes).abs().max()), new
            if change < 1e-15:
                break
        z = z + h * torch.einsum("j,j...->...", weights, slopes)
    return z


def second_opinion() -> float:
    """Largest difference of ``exact`` over the whole range to DOP853 in other coordinates, ``dz/dr = (z - D) / r``."""
    from scipy.integrate import solve_ivp

    z = _start()
    data = mixture()

    def slope(r: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).view_as(z)
        return ((state - data.denoised(state, 1.0, r)) / r).numpy().ravel()

    span = (math.exp(FIRST), math.exp(LAST))
    solved = solve_ivp(slope, span, z.numpy().ravel(), method="DOP853", rtol=1e-13, atol=1e-15)
    return float((torch.from_numpy(solved.y[:, -1]).view_as(z) - exact(data, z, FIRST, LAST)).abs().max())


@functools.cache
def _states(grid: str, n: int, before: int) -> tuple[Tensor, ...]:
    """Exact ``z`` at steps ``-before`` to 0 of the grid, and last its value at step ``n``."""
    states = [_start()]
    for k in range(before):
        states.insert(0, exact(mixture(), states[0], BETWEEN[grid](-k / n), BETWEEN[grid](-(k + 1) / n)))
    return (*states, _finish())


@functools.cache
def _finish() -> Tensor:
    return exact(mixture(), _start(), FIRST, LAST)


def _denoise(path: Path) -> walk.Denoise:
    data = mixture()
    return lambda x, row: data.denoised(x, *path.alpha_sigma(row.t))


def solver_error(path: Path, solver: Solver, grid: str, n: int, *, started: bool) -> float:
    """Relative error after ``n`` steps, root mean square.

    Args:
        path: the forward process.
        solver: must add no noise.
        grid: a name of ``BETWEEN``.
        n: steps between the two ends.
        started: hand the solver exact values: it walks some steps before the start, and its state is put right after
            each, so that its history holds exact estimates. It also walks on past the end, so that orders that fall
            towards the last step have not fallen yet. Otherwise the solver starts and ends as in use.
    """
    extra = min(solver.history, 4) + 1 if started else 0  # nobody remembers more than four steps, only stages of them
    times = [path.time(-BETWEEN[grid](k / n)) for k in range(-extra, n + extra + 1)]
    *known, truth = _states(grid, n, extra)
    alpha = path.alpha_sigma(times[0])[0]
    state, place, denoise = walk.start(alpha * known[0], solver.history), 0, _denoise(path)
    for row in solver.rows(path, times):
        state = walk.step(state, row, denoise)
        place += row.ends
        if row.ends and place <= extra:
            x = path.alpha_sigma(times[place])[0] * known[place]
            # an anchor with weights of its own is the corrected state at the step's start
            corrected = x if row.to_anchor is None else path.alpha_sigma(row.t)[0] * known[place - 1]
            state = state._replace(x=x, anchor=corrected)
        if place == extra + n:
            break
    z = state.x / path.alpha_sigma(times[place])[0]
    return float((z - truth).square().mean().sqrt() / truth.square().mean().sqrt())


class Order(NamedTuple):
    """A measured order and what it was fitted to."""

    order: float
    sizes: tuple[int, ...]
    errors: tuple[float, ...]


def fit(sizes: Sequence[int], errors: Sequence[float], floor: float = ROUND_OFF) -> Order:
    """Least-squares slope of log error over log n, of the three finest sizes whose errors are above ``floor``.

    A solver that is at round-off from the second size on is of infinite order as far as can be seen.
    """
    seen = [(n, e) for n, e in zip(sizes, errors, strict=True) if e > floor]
    order = math.inf
    if len(seen) > 1:
        logs = np.log(np.array(seen[-3:]))
        order = -float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    return Order(order, tuple(sizes), tuple(errors))


def order_of(path: Path, solver: Solver, grid: str, *, started: bool = True, sizes: Sequence[int] = SIZES) -> Order:
    """Measure the order on the mixture; stops refining at round-off.

    Orders are limits: where the slope is below the declared one, two finer sizes decide.
    """
    errors: list[float] = []
    for n in sizes:
        errors.append(solver_error(path, solver, grid, n, started=started))
        if errors[-1] < ROUND_OFF:
            break
    found = fit(sizes[: len(errors)], errors)
    if started and found.order < solver.order - TOLERANCE:
        sizes = (*found.sizes, *FINER)
        errors += [solver_error(path, solver, grid, n, started=True) for n in FINER]
        found = fit(sizes, errors)
    return found


def inversion_order(path: Path, solver: Solver, grid: str, sizes: Sequence[int] = SIZES) -> Order:
    """The same for a solver that walks upwards, from the end of the range to its start."""
    errors, truth = [], _start()
    for n in sizes:
        times = [path.time(-BETWEEN[grid](k / n)) for k in range(n + 1)]
        x = path.alpha_sigma(times[-1])[0] * _finish()
        *_, last = walk.walk(solver.rows(path, times), x, solver.history, _denoise(path))
        gap = last.x / path.alpha_sigma(times[0])[0] - truth
        errors.append(float(gap.square().mean().sqrt() / truth.square().mean().sqrt()))
    return fit(sizes, errors)


def loop_and_walk_differ(path: Path, prediction: Prediction, solver: Solver) -> float:
    """Largest difference between the loop, in float64, and the rows carried out plainly."""
    times = [path.time(-BETWEEN["karras"](k / 8)) for k in range(9)]
    rows, x = solver.rows(path, times), path.alpha_sigma(times[0])[0] * _start()
    oracle = Oracle(mixture(), path, prediction, [rows])
    table = build(path, prediction, solver, times, dtype=torch.float64)
    looped = sample(NetworkDenoiser(oracle), x, table, None, None)
    *_, last = walk.walk(rows, x, solver.history, _denoise(path))
    return float((looped - last.x).abs().max())
