"""Every solver against the exact solution, and the identities between them."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.benchmarks.orders import PATHS, error, gaussian, graded_times, measured_order, run, smooth_times
from fastdiff.errors import PlanError
from fastdiff.sampling.grid import uniform
from fastdiff.sampling.path import RectifiedFlow, linear_betas
from fastdiff.sampling.prediction import PREDICTIONS, DirectMap, MeanVelocity, Velocity
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.solvers.ddpm import DDPM
from fastdiff.sampling.solvers.dpmpp import DPMppSDE
from fastdiff.sampling.solvers.flow_map import FlowMap
from fastdiff.sampling.solvers.unipc import UniPC

DETERMINISTIC = {
    "ddim": DDIM(),
    "dpmpp_2m": SOLVERS["dpmpp_2m"](),
    "dpmpp_sde": DPMppSDE(eta=0.0),
    "heun": SOLVERS["heun"](),
    "unipc_1": UniPC(order=1, corrector=False),
    "unipc_2": UniPC(order=2, corrector=False),
    "unipc_2c": UniPC(order=2),
    "unipc_3": UniPC(order=3, corrector=False),
}
ONE_TIME = [name for name, p in PREDICTIONS.items() if not p.two_time]


def test_every_solver_is_measured_somewhere():
    stochastic = {DDPM}
    measured = {type(solver) for solver in DETERMINISTIC.values()} | stochastic | {FlowMap}
    assert {type(factory()) for factory in SOLVERS.values()} <= measured


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_is_the_declared_one(name, path):
    solver = DETERMINISTIC[name]
    assert measured_order(path, Velocity(), solver) >= solver.order - 0.25


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_order_is_not_above_the_declared_one(name):
    solver = DETERMINISTIC[name]
    assert measured_order(RectifiedFlow(), Velocity(), solver) <= solver.order + 0.25


@pytest.mark.parametrize("order", [2, 3])
def test_the_corrector_raises_the_order_by_one(order):
    sizes, path = (64, 256), RectifiedFlow()
    errors = [error(path, Velocity(), UniPC(order=order), n, graded_times) for n in sizes]
    assert math.log(errors[0] / errors[1]) / math.log(sizes[1] / sizes[0]) >= order + 1 - 0.25


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", ONE_TIME)
def test_all_predictions_agree(kind, path):
    times = smooth_times(path, 7)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    solver = DETERMINISTIC["dpmpp_2m"]
    truth = run(path, PREDICTIONS["x0"], solver, times, x)
    assert (run(path, PREDICTIONS[kind], solver, times, x) - truth).abs().max() < 1e-12


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("prediction", [MeanVelocity(), DirectMap()], ids=["mean_velocity", "direct_map"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_flow_map_is_exact(n, prediction, path):
    times = smooth_times(path, n)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    truth = gaussian().flow(path, x, times[0], times[-1])
    assert (run(path, prediction, FlowMap(), times, x) - truth).abs().max() < 1e-12


def test_a_two_time_network_on_its_diagonal_is_a_velocity_network():
    path = RectifiedFlow()
    times = uniform(path, 6)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    a, b = (run(path, p, DDIM(), times, x) for p in (MeanVelocity(), Velocity()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ddim_with_eta_1_is_ddpm_fixed_small(path):
    times = smooth_times(path, 5)
    for a, b in zip(DDIM(eta=1.0).rows(path, times), DDPM().rows(path, times), strict=True):
        assert a.to_x == pytest.approx(b.to_x, abs=1e-13)


def test_euler_on_the_straight_path_is_ddim():
    t, s = 0.7, 0.45
    row = DDIM().rows(RectifiedFlow(), (t, s))[0]
    # x + (s - t) * (x - D) / t
    assert row.to_x == pytest.approx({"x": 1 + (s - t) / t, "denoised": -(s - t) / t}, abs=1e-15)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_sde", "flow_map"])
def test_noise_keeps_the_marginal(name):
    """Gaussian data stay Gaussian: one short stochastic step must map the exact marginal to the exact marginal."""
    path, std = linear_betas(), 1.0
    times = (600.0, 599.0)  # the estimate lacks the posterior's spread, so a step is exact only in the limit
    options = {"ddim": {"eta": 1.0}, "flow_map": {"gamma": 0.8}}.get(name, {})
    solver = SOLVERS[name](**options)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (path.alpha_sigma(t) for t in times)
    gain, variance = _propagate(solver, path, times, std)
    wide_t = (alpha_t * std) ** 2 + sigma_t**2
    wide_s = (alpha_s * std) ** 2 + sigma_s**2
    if name == "flow_map":  # the jump itself is the exact flow, so only the noise added back is under test
        row = solver.rows(path, times)[0]
        alpha_l, sigma_l = path.alpha_sigma(row.s)
        assert (alpha_s / alpha_l) ** 2 * sigma_l**2 + row.to_x["n1"] ** 2 == pytest.approx(sigma_s**2, rel=1e-12)
        return
    assert gain**2 * wide_t + variance == pytest.approx(wide_s, rel=2e-4)


def _propagate(solver, path, times, std):
    """Gain and added variance of one step, with D = E[x0 | x] of N(0, std^2) data put in for the network."""
    anchor = x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # coefficients of (start, n1, n2)
    units = {"n1": torch.tensor([0.0, 1.0, 0.0]).double(), "n2": torch.tensor([0.0, 0.0, 1.0]).double()}
    for row in solver.rows(path, times):
        alpha, sigma = path.alpha_sigma(row.t)
        d = alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * x
        registers = {"x": x, "anchor": anchor, "denoised": d, **units}
        x = sum(weight * registers[name] for name, weight in row.to_x.items())
        if row.to_anchor is None:
            anchor = x
    return float(x[0]), float(x[1] ** 2 + x[2] ** 2)


@pytest.mark.parametrize(
    ("factory", "options"),
    [(DDIM, {"eta": 1.5}), (DDPM, {"variance": "huge"}), (FlowMap, {"gamma": -1}), (UniPC, {"order": 9})],
)
def test_options_out_of_range_are_refused(factory, options):
    with pytest.raises(PlanError, match="allowed"):
        factory(**options)
