"""The claim everything stands on: a sampler is a walk over a table, and images at different rows share a batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastdiff.benchmarks.orders import gaussian
from fastdiff.sampling.analytic import Oracle
from fastdiff.sampling.denoiser import NetworkDenoiser
from fastdiff.sampling.grid import uniform
from fastdiff.sampling.loop import State, advance, sample
from fastdiff.sampling.noise import PhiloxNoise
from fastdiff.sampling.path import RectifiedFlow
from fastdiff.sampling.prediction import MeanVelocity
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.table import build, merge

PATH = RectifiedFlow()
# (solver, steps, clip): every sampler of the library, with different numbers of steps, rows, histories and draws
CAST = {
    name: (factory(), 5 + i % 6, 0.9 if i % 5 == 2 else None)
    for i, (name, factory) in enumerate(SOLVERS.items())
    if name not in ("euler_maruyama", "ddim_inversion")  # neither can start from pure noise
} | {
    "ddim_clipped": (DDIM(keep_noise=True), 7, 0.5),
    "unipc_3": (SOLVERS["unipc"](order=3), 9, None),
    "unipc_noise": (SOLVERS["unipc"](order=2, predict_x0=False), 8, None),
    "sa_solver_4": (SOLVERS["sa_solver"](predictor_order=3, corrector_order=4, tau=0.7), 9, None),
    "dpmpp_2s_ancestral": (SOLVERS["dpmpp_2s"](eta=0.8), 6, None),
    "flow_map_renoised": (SOLVERS["flow_map"](gamma=0.7), 4, 0.9),
}
HISTORY = max(solver.history for solver, _, _ in CAST.values())


def _tables():
    for solver, steps, clip in CAST.values():
        times = uniform(PATH, steps)
        table = build(PATH, MeanVelocity(), solver, times, clip=clip, history=HISTORY, dtype=torch.float64)
        yield table, solver.rows(PATH, times)


def _alone(table, rows, x, seed):
    oracle = Oracle(gaussian(), PATH, MeanVelocity(), [rows])
    return sample(NetworkDenoiser(oracle), x, table, PhiloxNoise(torch.tensor([seed])), None)


@pytest.mark.parametrize("offset", [0, 3])
def test_mixed_batch_equals_each_alone(offset):
    """Each image walks its own table; one joins `offset` rows late per place, so stages differ inside the batch."""
    tables = list(_tables())
    count = len(tables)
    start = torch.randn(count, 1, 3, 4, dtype=torch.float64)
    alone = [_alone(t, rows, start[i : i + 1], 100 + i) for i, (t, rows) in enumerate(tables)]
    oracle = NetworkDenoiser(Oracle(gaussian(), PATH, MeanVelocity(), [rows for _, rows in tables]))
    noise = PhiloxNoise(torch.arange(100, 100 + count))
    state, done = State.start(start, HISTORY), {}
    for tick in itertools.count():
        position = [tick - (offset * i) % 5 for i in range(count)]
        walking = [0 <= p < len(t.structure.rows) for p, (t, _) in zip(position, tables, strict=True)]
        if len(done) == count:
            break
        index = [p if w else 0 for p, w in zip(position, walking, strict=True)]
        rows = torch.stack([t.values[k] for k, (t, _) in zip(index, tables, strict=True)])
        plan = merge([t.structure.rows[k] for k, (t, _) in zip(index, tables, strict=True)])
        new = advance(oracle, state, rows, torch.tensor(index), plan, noise, None)
        keep = torch.tensor(walking).view(-1, 1, 1, 1)  # idle places keep what they hold
        pairs = zip((new.x, new.anchor, *new.history), (state.x, state.anchor, *state.history), strict=True)
        x, anchor, *history = (torch.where(keep, a, b) for a, b in pairs)
        state = State(x, anchor, tuple(history))
        for i, (t, _) in enumerate(tables):
            if walking[i] and position[i] == len(t.structure.rows) - 1:
                done[i] = state.x[i : i + 1].clone()
    for i, name in enumerate(CAST):
        assert torch.allclose(done[i], alone[i], rtol=0, atol=1e-12), name


def test_a_neighbour_that_fails_harms_nobody():
    table, rows = next(_tables())
    start = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    start[1] = float("nan")
    oracle = Oracle(gaussian(), PATH, MeanVelocity(), [rows])
    both = sample(NetworkDenoiser(oracle), start, table, None, None)
    assert torch.equal(both[:1], _alone(table, rows, start[:1], 0))


def test_merge_is_the_union_and_keeps_equal_plans():
    plans = [table.structure.rows[0] for table, _ in _tables()]
    merged = merge(plans)
    for plan in plans:
        assert set(plan.x) <= set(merged.x)
        assert set(plan.history) <= set(merged.history)
    assert merged.push is None and merged.draws[0]
    assert merge(plans[:1] * 3) == plans[0]


def test_clipping_bounds_the_estimate_and_keeps_the_noise_direction():
    solver = DDIM(keep_noise=True)
    t, s, bound = 0.8, 0.5, 0.1
    table = build(PATH, MeanVelocity(), solver, (t, s), clip=bound, dtype=torch.float64)
    x = torch.randn(3, 1, 3, 4, dtype=torch.float64)
    oracle = NetworkDenoiser(Oracle(gaussian(), PATH, MeanVelocity(), [solver.rows(PATH, (t, s))]))
    got = sample(oracle, x, table, None, None)
    denoised = gaussian().denoised(x, *PATH.alpha_sigma(t))
    noise = (x - (1 - t) * denoised) / t
    assert torch.allclose(got, (1 - s) * denoised.clamp(-bound, bound) + s * noise, rtol=0, atol=1e-14)
