"""What measures the samplers is itself right: the truth, the walk, the fit, the peers. Few sizes; no timing."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.benchmarks import accuracy, moments, orders, sampler_peers
from fastdiff.benchmarks.host_cost import Identity, bare
from fastdiff.benchmarks.variants import distinct, variants
from fastdiff.sampling.denoiser import NetworkDenoiser
from fastdiff.sampling.grid import uniform
from fastdiff.sampling.loop import sample
from fastdiff.sampling.path import EDM, RectifiedFlow, linear_betas
from fastdiff.sampling.prediction import Velocity
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.solvers.flow_map import FlowMap
from fastdiff.sampling.table import build

PATH = RectifiedFlow()
ODE, SDE = variants(noise=False), variants(noise=True)


def ids(found):
    return [variant.label for variant in found]


def test_every_solver_of_the_registry_is_measured():
    elsewhere = {"ddim_inversion"}  # it walks upwards
    assert {variant.name for variant in ODE + SDE} >= set(SOLVERS) - elsewhere


def test_two_solutions_of_the_mixture_agree():
    pytest.importorskip("scipy")
    assert orders.second_opinion() < 1e-12


@pytest.mark.parametrize("variant", ODE, ids=ids(ODE))
def test_the_order_on_a_mixture_is_at_least_the_declared_one(variant):
    """One grid of three and coarse sizes; ``make check-samplers`` measures the rest."""
    sizes = (32, 64, 128) if variant.solver.order < 4 else (64, 128, 256)
    found = orders.order_of(PATH, variant.solver, "log_snr", sizes=sizes)
    assert found.order >= variant.solver.order - orders.TOLERANCE, found


@pytest.mark.parametrize("variant", distinct(ODE), ids=ids(distinct(ODE)))
def test_the_loop_is_its_rows_carried_out(variant):
    assert orders.loop_and_walk_differ(linear_betas(), Velocity(), variant.solver) < 1e-12


def test_inversion_is_of_first_order():
    found = orders.inversion_order(PATH, SOLVERS["ddim_inversion"](), "log_snr", (32, 64, 128))
    assert found.order == pytest.approx(1, abs=orders.TOLERANCE)


def test_paths_are_one_in_the_ratio_of_noise_to_signal():
    """Solvers in log-SNR make the same error on every path."""
    errors = [orders.solver_error(path, SOLVERS["dpmpp_2m"](), "karras", 16, started=True) for path in (PATH, EDM())]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


def test_the_fit_leaves_out_round_off():
    sizes = (32, 64, 128, 256, 512)
    errors = [max(n**-6.0, 2e-14) for n in sizes]
    assert orders.fit(sizes, errors).order == pytest.approx(6, abs=0.01)
    assert orders.fit(sizes, [1e-16] * 5).order == math.inf


@pytest.mark.parametrize("variant", SDE, ids=ids(SDE))
def test_moments_converge_at_the_declared_weak_order(variant):
    found = moments.weak_order(PATH, variant.solver, "log_snr", (32, 64, 128))
    assert found.order >= variant.solver.order - orders.TOLERANCE, found


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_sde", "dpmpp_2m_sde", "sa_solver"])
def test_samples_have_the_propagated_moments(name):
    """One kind each of stages, shared draws, remembered noise and noise drawn again; the check runs all."""
    assert moments.monte_carlo(PATH, SOLVERS[name](), count=10_000) < 4.5


def test_propagation_of_a_solver_without_noise_is_its_error():
    """One pixel of variance 1 under a flow map is exact; under one DDIM step it is what the weights say."""
    times = moments.times_of(PATH, "log_snr", 3)
    mean, variance = moments.propagate(PATH, FlowMap(), times)
    exact = moments.marginal(PATH, times[-1])
    assert torch.allclose(mean, exact[0], atol=1e-14) and torch.allclose(variance, exact[1], atol=1e-14)


def test_bare_arithmetic_is_the_loop():
    for name in ("ddim", "dpmpp_2m", "unipc", "heun"):
        table = build(PATH, Velocity(), SOLVERS[name](), uniform(PATH, 4))
        x = torch.randn(1, 2, 4, 4)
        assert torch.equal(bare(table, x)(), sample(NetworkDenoiser(Identity()), x, table, None, None))


def _toy() -> accuracy.Problem:
    """The mixture of the order table, on the betas of DDPM, from pure noise to clean data."""
    data, path = orders.mixture(), linear_betas()
    alpha, sigma = path.alpha_sigma(path.t_start)
    start = torch.randn(4, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    z = orders.exact(data, start.double() / alpha, math.log(sigma / alpha), -9.0, 0.3)
    return accuracy.Problem(
        "toy", "vp", path, data.denoised(z, 1.0, math.exp(-9.0)), 0.0,
        lambda x, a, s: data.denoised(x.double(), a, s).to(x.dtype),
        lambda a, s: start * (a * a + s * s) ** 0.5, sigma / alpha,
    )  # fmt: skip


def test_peers_solve_the_problem_they_are_given():
    """With many calls everybody is near the solution: nobody is fed wrong times, scales or outputs."""
    pytest.importorskip("diffusers")
    problem = _toy()
    found = [*sampler_peers.diffusers_peers("vp"), *sampler_peers.k_diffusion_peers(problem.sigma_max)]
    chosen = [peer for peer in found if any(part in peer.label for part in ("karras from 0.01", "on trailing"))]
    chosen = [peer for peer in chosen if "bh1" not in peer.label]  # diffusers' gives NaN on fine grids
    assert len(chosen) > 10
    for peer in chosen:
        done = peer.run(problem.denoised, problem.first, 32)
        assert done is not None and 29 <= done.calls <= 32, peer.label
        assert problem.error(done.x) < 0.1, (peer.label, problem.error(done.x))


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "unipc", "ddim"])
def test_ours_counts_calls_and_solves_the_problem(name):
    problem = _toy()
    variant = next(variant for variant in ODE if variant.name == name)
    done = accuracy.ours(problem, variant, accuracy.grids()["log_snr"], 60)
    assert done is not None and 58 <= done.calls <= 60
    assert problem.error(done.x) < 0.1
