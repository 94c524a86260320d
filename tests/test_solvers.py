"""Every solver against the exact solution, and the identities between them."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.benchmarks.orders import PATHS, error, gaussian, graded_times, measured_order, run, smooth_times
from fastdiff.errors import PlanError
from fastdiff.sampling.grid import uniform
from fastdiff.sampling.path import EDM, RectifiedFlow, linear_betas
from fastdiff.sampling.prediction import PREDICTIONS, DirectMap, MeanVelocity, Velocity
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.solvers.ddpm import DDPM
from fastdiff.sampling.solvers.flow_map import FlowMap

# name in SOLVERS, options: everything that has a noise-free form
DETERMINISTIC = [
    ("ddim", {}),
    ("tcd", {"gamma": 0.0}),
    ("gradient_estimation", {}),
    ("heun", {}),
    ("heun", {"coordinate": "ratio"}),
    ("rk2", {}),
    ("rk3", {}),
    ("rk4", {}),
    ("dpm_2m", {}),
    ("dpm_2m", {"solver_type": "heun"}),
    ("dpm_3m", {}),
    ("dpm_2s", {}),
    ("dpm_3s", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_3m", {}),
    ("dpmpp_2s", {}),
    ("dpmpp_3s", {}),
    ("dpmpp_sde", {"eta": 0.0}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
    ("res_multistep", {}),
    ("unipc", {"order": 1, "corrector": False}),
    ("unipc", {"order": 2, "corrector": False}),
    ("unipc", {"order": 3, "corrector": False}),
    ("unipc", {"order": 4, "corrector": False}),
    ("unipc", {"order": 1}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3}),
    ("unipc", {"order": 2, "solver_type": "bh1"}),
    ("unipc", {"order": 3, "predict_x0": False}),
    ("sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 4}),
    ("er_sde", {"scale": "ode"}),
    ("deis", {"order": 2}),
    ("deis", {}),
    ("deis", {"variable": "log_snr"}),
    ("lms", {"order": 3}),
    ("lms", {}),
    ("ipndm", {}),
    ("plms", {}),
    ("pndm", {}),
]
NAMES = [f"{name}-{'-'.join(map(str, options.values()))}".rstrip("-") for name, options in DETERMINISTIC]
NOISY_ONLY = {"ddpm", "euler_maruyama", "predictor_corrector", "lcm", "dpm_2m_sde"}
ELSEWHERE = {"flow_map", "ddim_inversion"}  # tests of their own below
ALIASES = {"euler": "ddim", "euler_ancestral": "ddim", "dpm2": "dpm_2s", "ipndm_v": "lms", "dpmpp_2m_sde": "dpmpp_2m"}


def solver_of(case):
    name, options = case
    return SOLVERS[name](**options)


ONE_TIME = [name for name, p in PREDICTIONS.items() if not (p.two_time or p.jumps)]


def test_every_solver_is_measured_somewhere():
    measured = {name for name, _ in DETERMINISTIC} | NOISY_ONLY | ELSEWHERE | set(ALIASES)
    assert set(SOLVERS) == measured


@pytest.mark.parametrize("path", ["straight", "edm", "ou"])
@pytest.mark.parametrize("case", DETERMINISTIC, ids=NAMES)
def test_order_is_the_declared_one(case, path):
    """Between sizes at which the error is far from round-off; high orders get there early."""
    solver = solver_of(case)
    sizes = (64, 256) if solver.order < 3 else (32, 96)
    errors = [error(PATHS[path], Velocity(), solver, n, graded_times) for n in sizes]
    assert math.log(errors[0] / errors[1]) / math.log(sizes[1] / sizes[0]) >= solver.order - 0.25


@pytest.mark.parametrize("case", [("ddim", {}), ("dpmpp_2m", {}), ("heun", {}), ("unipc", {"order": 2})], ids=str)
def test_order_is_not_above_the_declared_one(case):
    solver = solver_of(case)
    assert measured_order(RectifiedFlow(), Velocity(), solver) <= solver.order + 0.25


@pytest.mark.parametrize("name", ["dpmpp_3m", "dpm_3m"])
def test_the_published_code_of_the_third_order_has_order_two(name):
    solver = SOLVERS[name](compat="diffusers")
    errors = [error(RectifiedFlow(), Velocity(), solver, n, graded_times) for n in (32, 128)]
    assert solver.order == 2
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", ONE_TIME)
def test_all_predictions_agree(kind, path):
    times = smooth_times(path, 7)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    solver = SOLVERS["dpmpp_2m"]()
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


@pytest.mark.parametrize("path", [linear_betas(), EDM()], ids=["vp", "edm"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {}),
        ("res_multistep", {"order": 1}),
        ("deis", {"order": 1}),
        ("lms", {"order": 1}),
        ("ipndm", {"max_order": 1}),
        ("unipc", {"order": 1, "corrector": False}),
        ("unipc", {"order": 1, "corrector": False, "predict_x0": False}),
        ("er_sde", {"estimates": 1, "scale": "ode"}),
        ("tcd", {"gamma": 0.0}),
        ("gradient_estimation", {"gamma": 1.0}),
    ],
    ids=str,
)
def test_first_order_solvers_are_one(name, options, path):
    times = uniform(path, 5)
    for a, b in zip(SOLVERS[name](**options).rows(path, times), DDIM().rows(path, times), strict=True):
        got = {register: weight for register, weight in a.to_x.items() if abs(weight) > 1e-12}
        assert got == pytest.approx({r: w for r, w in b.to_x.items() if w}, rel=1e-9)


@pytest.mark.parametrize("path", [linear_betas(), RectifiedFlow()], ids=["vp", "straight"])
def test_stochastic_first_order_solvers_are_one(path):
    """At full stochasticity the step of the SDE is DDPM's, by whatever road."""
    times = smooth_times(path, 5)
    expected = DDPM().rows(path, times)
    for name, options in [
        ("euler_ancestral", {}),
        ("sa_solver", {"predictor_order": 1, "corrector_order": 0}),
        ("er_sde", {"estimates": 1, "scale": "sde"}),
    ]:
        for a, b in zip(SOLVERS[name](**options).rows(path, times), expected, strict=True):
            assert a.to_x == pytest.approx(b.to_x, abs=1e-12), name


def test_ctm_with_gamma_1_is_consistency_multistep():
    path = RectifiedFlow()
    times = uniform(path, 4)
    for a, b in zip(FlowMap(gamma=1.0).rows(path, times), SOLVERS["lcm"]().rows(path, times), strict=True):
        assert {k: w for k, w in a.to_x.items() if w} == pytest.approx(b.to_x, abs=1e-15)
        assert (a.t, a.s, a.draws) == (b.t, b.s, b.draws)


def test_sde_solvers_without_noise_are_their_ode_forms():
    path = linear_betas()
    times = smooth_times(path, 6)
    for sde, ode in (("dpmpp_2m_sde", "dpmpp_2m"), ("dpmpp_3m_sde", "dpmpp_3m")):
        assert SOLVERS[sde](eta=0.0).rows(path, times) == SOLVERS[ode]().rows(path, times)


@pytest.mark.parametrize("path", [linear_betas(), RectifiedFlow()], ids=["vp", "straight"])
def test_inversion_finds_the_noise(path):
    """Up and down again: the error falls with the steps, and the noise found is the exact flow's."""
    x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 1, 3, 4)
    errors = []
    for n in (100, 400):
        times = tuple(path.time(-2.0 + 6.0 * i / n) for i in range(n + 1))
        noisy = run(path, Velocity(), SOLVERS["ddim_inversion"](), times, x0)
        errors.append(float((noisy - gaussian().flow(path, x0, times[-1], times[0])).abs().max()))
    assert errors[1] < errors[0] / 3.5 and errors[1] < 0.02


def test_inversion_starts_at_clean_data():
    rows = SOLVERS["ddim_inversion"]().rows(linear_betas(), (900.0, 500.0, 0.0))
    assert [row.t for row in rows] == [500.0, 500.0]
    assert all(math.isfinite(w) for row in rows for w in row.to_x.values())


def test_unic_corrects_the_step_that_leaves_pure_noise():
    """Half the kernel's integral on each estimate, and an error that falls with the third power of the step."""
    path, errors = RectifiedFlow(), []
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    for h in (0.04, 0.02):
        times = (1.0, 1 - h, 1 - h - 1e-9)
        weights = SOLVERS["unipc"](order=2, lower_final="never").rows(path, times)[1].to_anchor
        assert weights == pytest.approx({"anchor": 1 - h, "h1": h / 2, "denoised": h / 2})
        got = run(path, Velocity(), SOLVERS["unipc"](order=2, lower_final="never"), times, x)
        errors.append(float((got - gaussian().flow(path, x, times[0], times[-1])).abs().max()))
    assert errors[0] / errors[1] > 6


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_rows_are_finite_down_to_clean_data(name):
    """From pure noise to clean data, the two places where formulas in log-SNR break down."""
    solver, path = SOLVERS[name](), RectifiedFlow()
    times = (0.999, 0.7, 0.4, 0.2, 0.0) if name in ("euler_maruyama", "ddim_inversion") else uniform(path, 5)
    for row in solver.rows(path, times):
        for weights in (row.to_x, row.to_anchor or {}, row.to_history or {}):
            assert all(math.isfinite(weight) for weight in weights.values())
        wanted = {n for n in ("n1", "n2") if any(n in (w or {}) for w in (row.to_x, row.to_anchor))}
        assert wanted == {n for n, draw in zip(("n1", "n2"), row.draws, strict=True) if draw is not None}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"eta": 1.5}),
        ("ddpm", {"variance": "huge"}),
        ("flow_map", {"gamma": -1}),
        ("tcd", {"gamma": 2}),
        ("unipc", {"order": 9}),
        ("unipc", {"solver_type": "bh3"}),
        ("dpmpp_2m", {"solver_type": "euler"}),
        ("dpmpp_2m", {"lower_final": "maybe"}),
        ("dpmpp_3m", {"compat": "comfy"}),
        ("dpmpp_2m_sde", {"eta": -0.1}),
        ("dpmpp_2s", {"eta": 2}),
        ("deis", {"order": 4}),
        ("deis", {"variable": "frames"}),
        ("lms", {"order": 0}),
        ("ipndm", {"max_order": 5}),
        ("gradient_estimation", {"gamma": 0.5}),
        ("heun", {"coordinate": "polar"}),
        ("er_sde", {"scale": "loud"}),
        ("er_sde", {"estimates": 4}),
        ("predictor_corrector", {"snr": 0}),
        ("predictor_corrector", {"corrector_steps": 0}),
        ("ddim_inversion", {"told": "never"}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(PlanError, match="allowed"):
        SOLVERS[name](**options)
