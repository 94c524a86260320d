"""Error at equal numbers of network calls: this library beside diffusers and k-diffusion, every solver and grid.

Two problems: a mixture fitted to scikit-learn's digits on the linear betas of DDPM, with its exact network; and the
bundled trained UNet on the straight path. All start from the same noise, ask the same network, and are compared with
the converged solution of the same ODE. What is counted is calls of the network: a step of Heun has two.

Each library may choose its best solver and grid at each budget; solvers that add noise have no such solution and are
left to ``moments``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.benchmarks.orders import exact
from fastdiff.benchmarks.sampler_peers import SHIFTS, Denoised, First, Peer, Run, diffusers_peers, k_diffusion_peers
from fastdiff.benchmarks.variants import Variant, distinct, variants
from fastdiff.errors import PlanError
from fastdiff.pipeline import Pipeline
from fastdiff.sampling import GRIDS
from fastdiff.sampling.analytic import fit_mixture
from fastdiff.sampling.denoiser import Cond, NetworkDenoiser, Prepared
from fastdiff.sampling.grid import Grid, Times
from fastdiff.sampling.loop import sample
from fastdiff.sampling.path import Path, RectifiedFlow, linear_betas
from fastdiff.sampling.prediction import X0
from fastdiff.sampling.solvers import Row, Solver
from fastdiff.sampling.table import build

BUDGETS = (4, 6, 8, 10, 20)
SCOUTS = ("unipc", "ipndm", "gradient_estimation")  # they choose the grids for all others
KEPT = 4  # grids kept for each budget
PURE = 50.0  # sigma / alpha from which on a state is noise for all purposes


class Problem(NamedTuple):
    """One ODE, where to start it and its solution."""

    name: str
    kind: str  # of diffusers' schedulers: "vp" or "flow"
    path: Path
    truth: Tensor  # [B, C, H, W]
    uncertainty: float  # relative difference to a coarser solution
    denoised: Denoised
    first: First
    sigma_max: float  # where k-diffusion starts

    def error(self, x: Tensor) -> float:
        """Root mean square error, relative to the solution's own size; infinite where it is not a number."""
        error = float((x.double() - self.truth).square().mean().sqrt() / self.truth.square().mean().sqrt())
        return error if math.isfinite(error) else math.inf


class Score(NamedTuple):
    """One sampler at one budget."""

    library: str
    label: str
    budget: int
    calls: int
    error: float


@functools.cache
def digits_mixture(count: int = 32) -> Problem:
    """Ten Gaussians of full covariance fitted to real 8 by 8 digits in [-1, 1], under DDPM's betas."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images)[:, None] / 8 - 1
    data = fit_mixture(images, 10, full=True, floor=1e-3)
    path = linear_betas()
    alpha, sigma = path.alpha_sigma(path.t_start)
    start = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def solve(longest: float) -> Tensor:
        low = -10.0  # below sigma / alpha = 5e-5 the estimate is the solution to 1e-7
        z = exact(data, start.double() / alpha, math.log(sigma / alpha), low, longest)
        return data.denoised(z, 1.0, math.exp(low))

    truth, coarse = solve(0.15), solve(0.3)
    return Problem(
        "mixture fitted to digits",
        "vp",
        path,
        truth,
        float((coarse - truth).square().mean().sqrt() / truth.square().mean().sqrt()),
        lambda x, alpha, sigma: data.denoised(x.double(), alpha, sigma).to(x.dtype),
        lambda alpha, sigma: start * (alpha * alpha + sigma * sigma) ** 0.5,
        sigma / alpha,
    )


@functools.cache
def digits_unet(count: int = 4, steps: int = 2048) -> Problem:
    """The bundled network as a velocity network, without guidance; image ``i`` is of class ``i``.

    A trained network is rough in time at the scale of one timestep, so no high order helps: the solution is found by
    Adams and Bashforth's method of order 2 in many equal steps.
    """
    pipe, path = Pipeline.from_pretrained("digits"), RectifiedFlow()
    config = pipe.model.network.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    label, index = Cond(torch.arange(count) % 10), torch.zeros(count, dtype=torch.int64)

    @torch.no_grad()
    def velocity(x: Tensor, t: float) -> Tensor:
        prepared = pipe.network.prepare(label, torch.full((1, 1, 2), path.timestep(t)))
        return pipe.network(x.float(), index, prepared)

    def denoised(x: Tensor, alpha: float, sigma: float) -> Tensor:
        scale = alpha + sigma
        t = sigma / scale
        return (x / scale - t * velocity(x / scale, t)).to(x.dtype)

    def solve(last: float, steps: int) -> Tensor:
        x, h = start.double(), (last - 1.0) / steps
        before = velocity(x, 1.0)
        for i in range(steps):
            now = velocity(x, 1.0 + i * h)
            x, before = x + h * (1.5 * now - 0.5 * before), now
        return x

    @functools.cache
    def arrived(t: float) -> Tensor:
        return solve(t, 16).float()

    def first(alpha: float, sigma: float) -> Tensor:
        """Walks that start just below pure noise, ours and peers', are handed the solution there."""
        t = sigma / (alpha + sigma)
        state = arrived(t) if t < 1 and sigma >= PURE * alpha else start
        return state * (alpha + sigma)

    truth, coarse = solve(0.0, steps), solve(0.0, steps // 2)
    uncertainty = float((coarse - truth).square().mean().sqrt() / truth.square().mean().sqrt())
    return Problem("trained UNet", "flow", path, truth, uncertainty, denoised, first, 160.0)


# --- this library ---------------------------------------------------------------------------------------------------


class _Asked:
    """The problem's network for the loop, at the exact times of the rows."""

    def __init__(self, problem: Problem, rows: Sequence[Row]):
        self.problem, self.rows = problem, rows

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        return None

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared) -> Tensor:
        return self.problem.denoised(x, *self.problem.path.alpha_sigma(self.rows[int(row_index[0])].t))


def grids(shifts: Sequence[float] = SHIFTS) -> dict[str, Grid]:
    """Our grids, those with a lowest noise level also with the usual ones; every shift, with several ends."""
    found: dict[str, Grid] = {}
    for name, grid in GRIDS.items():
        found[name] = grid
        if "sigma_min" in inspect.signature(grid).parameters:
            for low in (0.002, 0.03):
                found[f"{name} from {low}"] = functools.partial(grid, sigma_min=low)
    for shift, first, last in itertools.product(shifts, (1.0, 0.999), (None, 0.03)):
        ends = ("" if first == 1 else f" below {first}") + ("" if last is None else f" from {last}")
        found[f"shift {shift:g}{ends}"] = functools.partial(GRIDS["shifted"], shift=shift, t_first=first, t_last=last)
    return found


def _different(path: Path, n: int, shifts: Sequence[float]) -> dict[str, Grid]:
    """The grids that are for this path and this many steps, without repetitions."""
    found: dict[tuple[float, ...], tuple[str, Grid]] = {}
    for name, grid in grids(shifts).items():
        try:
            found.setdefault(tuple(grid(path, n)), (name, grid))
        except PlanError:
            continue
    return dict(found.values())


def ours(problem: Problem, variant: Variant, grid: Grid, budget: int) -> Run | None:
    """Run one of our solvers with as many steps as the budget allows; None where it allows none."""
    for n in range(budget, 0, -1):
        try:
            times = grid(problem.path, n)
            rows = variant.solver.rows(problem.path, times)
        except PlanError:
            continue  # the grid is not for this path, or not for this many steps
        if len(rows) <= budget:
            x = problem.first(*problem.path.alpha_sigma(times[0]))  # as the peers start
            return Run(walked(problem, variant.solver, times, x), len(rows))
    return None


@torch.no_grad()
def walked(problem: Problem, solver: Solver, times: Times, x: Tensor) -> Tensor:
    """Where one of our solvers takes a state."""
    rows = solver.rows(problem.path, times)
    table = build(problem.path, X0(), solver, times)
    return sample(NetworkDenoiser(_Asked(problem, rows)), x, table, None, None)


def _ours(problem: Problem, variant: Variant, name: str, grid: Grid, budget: int) -> Score | None:
    done = ours(problem, variant, grid, budget)
    return done and Score("fastdiff", f"{variant.label} on {name}", budget, done.calls, problem.error(done.x))


def our_scores(
    problem: Problem,
    solvers: Sequence[Variant],
    kept: int = KEPT,
    shifts: Sequence[float] = SHIFTS,
    budgets: Sequence[int] = BUDGETS,
) -> Iterator[Score]:
    """A few solvers on every grid; then every solver on the ``kept`` grids that served them best at the budget."""
    scouts = [variant for variant in solvers if variant.name in SCOUTS and not any(variant.options.values())]
    for budget in budgets:
        best: dict[str, float] = {}
        done: set[tuple[str, str]] = set()
        for name, grid in _different(problem.path, budget, shifts).items():
            for variant in scouts:
                score = _ours(problem, variant, name, grid, budget)
                done.add((variant.label, name))
                if score:
                    best[name] = min(score.error, best.get(name, math.inf))
                    yield score
        for name in sorted(best, key=lambda name: best[name])[:kept]:
            for variant in solvers:
                if (variant.label, name) not in done and (
                    score := _ours(problem, variant, name, grids(shifts)[name], budget)
                ):
                    yield score


# --- all of them ----------------------------------------------------------------------------------------------------


def peer_scores(
    problem: Problem, peers: Iterator[Peer], refused: list[str], budgets: Sequence[int] = BUDGETS
) -> Iterator[Score]:
    """Every peer at every budget. What a library cannot run is left out, and why is added to ``refused``.

    Their schedulers end some settings with errors of these kinds; a reader of ``refused`` sees whether it was they.
    """
    for peer in peers:
        for budget in budgets:
            try:
                done = peer.run(problem.denoised, problem.first, budget)
            except (ValueError, NotImplementedError, IndexError, ZeroDivisionError) as error:
                refused.append(f"{peer.library} {peer.label}, {budget} calls: {type(error).__name__}: {error}"[:200])
                continue
            if done:
                yield Score(peer.library, peer.label, budget, done.calls, problem.error(done.x))


def scores(
    problem: Problem,
    refused: list[str],
    *,
    kept: int = KEPT,
    shifts: Sequence[float] = SHIFTS,
    budgets: Sequence[int] = BUDGETS,
) -> list[Score]:
    """Every sampler of every library at every budget; what a peer cannot run is added to ``refused``."""
    return [
        *our_scores(problem, distinct(variants(noise=False)), kept, shifts, budgets),
        *peer_scores(problem, diffusers_peers(problem.kind, shifts), refused, budgets),
        *peer_scores(problem, k_diffusion_peers(problem.sigma_max), refused, budgets),
    ]


def judged(problem: Problem, chosen: Sequence[Score], shifts: Sequence[float] = SHIFTS) -> list[Score]:
    """The same samplers on another problem of the same kind: more images, say."""
    runs: dict[tuple[str, str], Callable[[int], Run | None]] = {}
    for variant, (name, grid) in itertools.product(distinct(variants(noise=False)), grids(shifts).items()):
        runs["fastdiff", f"{variant.label} on {name}"] = functools.partial(ours, problem, variant, grid)
    for peer in (*diffusers_peers(problem.kind, shifts), *k_diffusion_peers(problem.sigma_max)):
        runs[peer.library, peer.label] = functools.partial(peer.run, problem.denoised, problem.first)
    found = []
    for one in chosen:
        done = runs[one.library, one.label](one.budget)
        assert done is not None and done.calls == one.calls
        found.append(one._replace(error=problem.error(done.x)))
    return found


LIBRARIES = ("fastdiff", "diffusers", "k-diffusion")


def shortlist(found: Sequence[Score], count: int = 5) -> list[Score]:
    """The most accurate samplers of every library at every budget, for the record."""
    return [score for name in LIBRARIES for budget in BUDGETS for score in best(found, name, budget, count)]


def best(found: Sequence[Score], library: str, budget: int, count: int = 1) -> list[Score]:
    """The most accurate samplers of a library at a budget."""
    chosen = [score for score in found if (score.library, score.budget) == (library, budget)]
    return sorted(chosen, key=lambda score: score.error)[:count]
