"""Walks of given weights: every classical walk is one of them."""

from __future__ import annotations

import pytest
import torch

from fastdiff.benchmarks.orders import PATHS, run, smooth_times
from fastdiff.errors import PlanError
from fastdiff.sampling.path import RectifiedFlow
from fastdiff.sampling.prediction import Velocity
from fastdiff.sampling.run import sample
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.solvers.non_stationary import NonStationary, non_stationary, registers, written_out

pytestmark = pytest.mark.fast
WALKS = ["ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "sa_solver:tau=0", "deis", "lms", "ipndm", "gradient_estimation",
         "heun", "rk2", "dpmpp_2s"]  # fmt: skip


def solver_of(spelled):
    name, _, option = spelled.partition(":")
    return SOLVERS[name](**({"tau": 0.0} if option else {}))


@pytest.mark.parametrize("path", ["straight", "vp", "edm"])
@pytest.mark.parametrize("name", WALKS)
def test_written_out_a_walk_is_the_same(name, path):
    way, solver = PATHS[path], solver_of(name)
    times = smooth_times(way, 5)
    walk = non_stationary(solver.rows(way, times), times)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    theirs = run(way, Velocity(), solver, times, x)
    ours = run(way, Velocity(), walk, walk.times, x)
    assert (theirs - ours).abs().max() < 1e-12 * theirs.abs().max()


def test_the_sums_are_those_of_the_formula():
    """One step of DDIM: x times sigma_s / sigma_t, and D for the rest."""
    way = RectifiedFlow()
    sums = written_out(SOLVERS["ddim"]().rows(way, (1.0, 0.5, 0.25)))
    assert sums.tolist() == [[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]


def test_noise_jumps_and_looking_back_too_far_are_refused():
    way, times = RectifiedFlow(), smooth_times(RectifiedFlow(), 9)
    for name in ("euler_ancestral", "flow_map"):
        with pytest.raises(PlanError, match="cannot be written out"):
            non_stationary(SOLVERS[name]().rows(way, times), times)
    rows = [row._replace(to_x={**row.to_x, f"h{min(i, 6)}": 0.1}) if i else row
            for i, row in enumerate(SOLVERS["dpmpp_2m"]().rows(way, times))]  # fmt: skip
    with pytest.raises(PlanError, match="further than 4 estimates"):
        non_stationary(rows, times)


def test_it_walks_its_own_times_alone():
    walk = NonStationary((1.0, 0.5, 0.0), ({"anchor": 0.5, "denoised": 0.5}, {"denoised": 1.0}))
    assert registers(0) == ("anchor", "denoised") and "x" in registers(7) and "x" not in registers(2)
    with pytest.raises(PlanError, match="2 steps of its own, whole; it got 3 steps"):
        sample(lambda x, t: x, (1, 1, 2, 2), sampler=walk, num_inference_steps=3)
    x = torch.ones(1, 1, 2, 2)
    end = sample(lambda x, t: 0.5 * x, (1, 1, 2, 2), sampler=walk, timesteps=[1000, 500, 0], latents=x)
    # D = x - t v: 0.5 at t = 1, so the state is 0.75 at t = 0.5, where D = 0.75 - 0.5 * 0.375
    assert end.flatten().tolist() == [0.5625] * 4
