"""Every prediction against Gaussian data, whose exact network and flow are written here from the papers, in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fastdiff
from fastdiff.errors import PlanError
from fastdiff.sampling.path import EDM, PATHS, DiscreteVP, RectifiedFlow, TrigFlow, linear_betas, quadratic_betas
from fastdiff.sampling.prediction import (
    IMM,
    LCM,
    PREDICTIONS,
    SCM,
    X0,
    Consistency,
    DirectMap,
    EDMPreconditioned,
    Eps,
    MeanVelocity,
    PeRFlow,
    Shortcut,
    TrigPreconditioned,
    V,
    first_order,
)
from fastdiff.sampling.solvers.flow_map import FlowMap

pytestmark = pytest.mark.fast
MEAN, STD = 0.37, 0.81
ALL_PATHS = {name: factory() for name, factory in PATHS.items()}
paths = pytest.mark.parametrize("path", ALL_PATHS.values(), ids=ALL_PATHS)
XS = (-1.3, 0.2, 2.1)


def middle(path):
    """Times where neither signal nor noise drowns the other."""
    return [t for t in (path.time(value) for value in (-2.5, -0.6, 0.4, 2.0)) if t <= path.t_start]


def states(path, t):
    alpha, sigma = path.alpha_sigma(t)
    return [alpha * x + sigma for x in XS]


def clean(path, x, t):
    """``E[x0 | x]`` and ``E[z | x]``."""
    alpha, sigma = path.alpha_sigma(t)
    x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
    return x0, (x - alpha * x0) / sigma


def flow(path, x, t, s):
    """The exact solution of the probability-flow ODE at ``s``."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
    wide_t, wide_s = (math.sqrt((a * STD) ** 2 + b**2) for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
    return alpha_s * MEAN + wide_s / wide_t * (x - alpha_t * MEAN)


def denoised(prediction, path, x, t, s, output):
    c = prediction.coefficients(path, t, s)
    return c.c_skip * x + c.c_out * output


# --- networks with one time ------------------------------------------------------------------------------------------


def _edm(path, x, t):
    alpha, sigma = path.alpha_sigma(t)
    level, data = sigma / alpha, 0.5
    x0, _ = clean(path, x, t)
    skip, out = data**2 / (level**2 + data**2), level * data / math.sqrt(level**2 + data**2)
    return (x0 - skip * x / alpha) / out


def _trigflow(path, x, t):
    """The regression target of the paper, ``cos * noise - sin * data / sigma_data``, at this noise level's angle."""
    alpha, sigma = path.alpha_sigma(t)
    angle = math.atan2(sigma / 0.5, alpha)
    x0, z = clean(path, x, t)
    return math.cos(angle) * z - math.sin(angle) * x0 / 0.5


def _mix(weights):
    def output(path, x, t):
        x0, z = clean(path, x, t)
        a, b = weights(path, t)
        return a * x0 + b * z

    return output


EXACT = {
    "eps": _mix(lambda path, t: (0, 1)),
    "x0": _mix(lambda path, t: (1, 0)),
    "v": _mix(lambda path, t: (-path.alpha_sigma(t)[1], path.alpha_sigma(t)[0])),
    "score": _mix(lambda path, t: (0, -1 / path.alpha_sigma(t)[1])),
    "velocity": _mix(lambda path, t: path.rate(t)),
    "edm": _edm,
    "trigflow": _trigflow,
}
ONE_TIME = [name for name, p in PREDICTIONS.items() if not p.jumps]


def test_every_prediction_has_an_exact_network_here():
    assert set(ONE_TIME) == set(EXACT)
    assert {name for name, p in PREDICTIONS.items() if p.jumps} == {*TWO_TIME, "consistency", "lcm", "scm", "perflow"}
    assert all(p.jumps for p in PREDICTIONS.values() if p.two_time)


@paths
@pytest.mark.parametrize("name", ONE_TIME)
def test_the_exact_network_gives_the_mean_of_the_clean_images(name, path):
    for t in middle(path):
        for x in states(path, t):
            got = denoised(PREDICTIONS[name], path, x, t, path.t_end, EXACT[name](path, x, t))
            assert got == pytest.approx(clean(path, x, t)[0], rel=1e-11, abs=1e-12)


@paths
@pytest.mark.parametrize("name", ONE_TIME)
def test_the_target_has_its_least_error_at_the_exact_network(name, path):
    """A regression learns the conditional mean of its target: that must be the network that coefficients expect."""
    for t in middle(path):
        data, noise, weight = PREDICTIONS[name].target(path, t)
        assert weight > 0
        for x in states(path, t):
            x0, z = clean(path, x, t)
            assert data * x0 + noise * z == pytest.approx(EXACT[name](path, x, t), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("name", ["x0", "v", "velocity", "trigflow"])
@pytest.mark.parametrize("path", ["straight", "linear_zero_snr", "trigflow"])
def test_pure_noise_is_a_place_to_start_from(name, path):
    path = PATHS[path]()
    x = 0.7 * path.alpha_sigma(path.t_start)[1]
    # the conditional mean of the data is their mean there, and z is x / sigma
    data, noise, _ = PREDICTIONS[name].target(path, path.t_start)
    got = denoised(PREDICTIONS[name], path, x, path.t_start, path.t_end, data * MEAN + noise * 0.7)
    assert got == pytest.approx(MEAN, abs=1e-13)


@pytest.mark.parametrize("name", ["eps", "score", "edm", "consistency"])
@pytest.mark.parametrize("path", ["straight", "linear_zero_snr", "trigflow"])
def test_predictions_that_need_signal_say_so(name, path):
    path = PATHS[path]()
    with pytest.raises(PlanError, match="alpha is 0"):
        PREDICTIONS[name].coefficients(path, path.t_start, path.t_end)


@pytest.mark.parametrize(("name", "path"), [("score", "edm"), ("edm", "edm"), ("velocity", "linear")])
def test_targets_that_do_not_exist_say_so(name, path):
    with pytest.raises(PlanError, match=r"at t=0\.0"):
        PREDICTIONS[name].target(PATHS[path](), 0.0)


def test_a_trigflow_network_is_the_papers_on_its_own_path():
    """cos(t) x - sin(t) sigma_data F(x / sigma_data), told t itself."""
    for t in (0.2, 0.9, 1.5):
        c = TrigPreconditioned(0.5).coefficients(TrigFlow(0.5), t, 0.0)
        assert c == pytest.approx((2.0, math.cos(t), -0.5 * math.sin(t), t, t), rel=1e-13)


def test_a_trigflow_network_is_edms_with_the_other_sign():
    for sigma in (0.01, 0.5, 60.0):
        a, b = (p.coefficients(EDM(), sigma, 0.0) for p in (TrigPreconditioned(), EDMPreconditioned()))
        assert a == pytest.approx(b._replace(c_out=-b.c_out), rel=1e-13)


@pytest.mark.parametrize(
    ("kind", "prediction"), [("epsilon", EDMPreconditioned()), ("v_prediction", TrigPreconditioned())]
)
def test_edm_preconditioning_is_diffusers_own(kind, prediction):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.EDMEulerScheduler(prediction_type=kind)
    x, output, sigma = (torch.tensor(v, dtype=torch.float64) for v in (0.8, -0.3, 1.7))
    c = prediction.coefficients(EDM(), 1.7, 0.0)
    assert c.c_in == pytest.approx(float(scheduler.precondition_inputs(1.0, sigma)), rel=1e-12)
    assert c.c_noise == pytest.approx(float(scheduler.precondition_noise(sigma)), rel=1e-12)
    want = float(scheduler.precondition_outputs(x, output, sigma))
    assert c.c_skip * 0.8 + c.c_out * -0.3 == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", ONE_TIME)
def test_one_time_networks_are_told_one_time(name):
    c = PREDICTIONS[name].coefficients(EDM(), 3.0, 0.0)
    assert c.c_noise == c.c_noise_to == 0.25 * math.log(3.0)


# --- flow maps -------------------------------------------------------------------------------------------------------


def _mean_velocity(path, x, t, s):
    return (flow(path, x, t, s) - x) / (s - t)


def _imm(path, x, t, s):
    """The network whose DDIM step lands on the flow, in the paper's Simple-EDM form with sigma_data = 1."""
    alpha, sigma = path.alpha_sigma(t)
    r, m = first_order(path, t, s)
    g = (flow(path, x, t, s) - r * x) / m
    norm = alpha**2 + sigma**2
    return (g - alpha / norm * x) / (-sigma / math.sqrt(norm))


TWO_TIME = {
    "mean_velocity": _mean_velocity,
    "shortcut": _mean_velocity,
    "direct_map": flow,
    "imm": _imm,
}


@paths
@pytest.mark.parametrize("name", TWO_TIME)
def test_a_first_order_step_with_a_flow_map_lands_on_its_jump(name, path):
    times = middle(path)
    for t, s in [(t, s) for t in times for s in times if s < t]:
        r, m = first_order(path, t, s)
        for x in states(path, t):
            got = denoised(PREDICTIONS[name], path, x, t, s, TWO_TIME[name](path, x, t, s))
            assert r * x + m * got == pytest.approx(flow(path, x, t, s), rel=1e-10, abs=1e-11)


@pytest.mark.parametrize("form", ["identity", "euler_fm"])
def test_the_other_forms_of_imm_land_on_their_jump(form):
    path, data = RectifiedFlow(), 0.5
    prediction = IMM(data, form)
    for t, s in [(1.0, 0.4), (0.7, 0.0), (0.3, 0.1)]:
        r, m = first_order(path, t, s)
        for x in states(path, t):
            landed = flow(path, x, t, s)
            output = (landed - r * x) / m if form == "identity" else (x - landed) / ((t - s) * data)
            assert r * x + m * denoised(prediction, path, x, t, s, output) == pytest.approx(landed, rel=1e-10)
        assert prediction.coefficients(path, t, s).c_in == pytest.approx(1 / (data * math.hypot(1 - t, t)))
    with pytest.raises(PlanError, match="'euler_fm'"):
        IMM(form="euler_fm").coefficients(linear_betas(), 900.0, 100.0)
    with pytest.raises(PlanError, match="form is 'edm'"):
        IMM(form="edm")


@pytest.mark.parametrize("name", ["mean_velocity", "shortcut"])
def test_on_the_diagonal_a_mean_velocity_is_the_velocity(name):
    path, prediction, velocity = linear_betas(), PREDICTIONS[name], PREDICTIONS["velocity"]
    assert prediction.coefficients(path, 400.0, 400.0)[:4] == velocity.coefficients(path, 400.0, 400.0)[:4]
    assert prediction.target(path, 400.0) == velocity.target(path, 400.0)


def test_what_two_time_networks_are_told():
    path = RectifiedFlow()
    assert MeanVelocity().coefficients(path, 0.75, 0.25)[3:] == (750.0, 250.0)
    assert IMM().coefficients(path, 0.75, 0.25)[3:] == (750.0, 250.0)
    assert Shortcut().coefficients(path, 0.75, 0.25)[3:] == (750.0, 500.0)
    assert Shortcut().coefficients(path, 0.75, 0.75)[3:] == (750.0, 0.0)


@pytest.mark.parametrize("name", TWO_TIME)
def test_a_target_time_that_cannot_be_told_is_refused(name):
    with pytest.raises(PlanError, match="tells its network"):
        PREDICTIONS[name].coefficients(EDM(), 5.0, 0.0)


@pytest.mark.parametrize("prediction", [DirectMap(), IMM()])
def test_jumps_without_a_diagonal_say_so(prediction):
    with pytest.raises(PlanError, match="target below t"):
        prediction.coefficients(RectifiedFlow(), 0.5, 0.5)


# --- consistency networks --------------------------------------------------------------------------------------------


def _consistency(x, t):
    """The paper's network for the exact consistency function of ``EDM(t_end=0.002)``: f = c_skip x + c_out F."""
    data, least = 0.5, 0.002
    skip = data**2 / ((t - least) ** 2 + data**2)
    out = data * (t - least) / math.sqrt(data**2 + t**2)
    return (flow(EDM(t_end=least), x, t, least) - skip * x) / out


@pytest.mark.parametrize("t", [0.003, 0.05, 0.7, 9.0, 80.0])
def test_a_consistency_network_lands_at_the_end(t):
    path = EDM(t_end=0.002)
    r, m = first_order(path, t, path.t_end)
    for x in states(path, t):
        got = r * x + m * denoised(Consistency(), path, x, t, path.t_end, _consistency(x, t))
        assert got == pytest.approx(flow(path, x, t, path.t_end), rel=1e-11, abs=1e-12)


def test_a_consistency_network_is_the_identity_at_sigma_min():
    c = Consistency().coefficients(EDM(), 0.002, 0.0)
    assert (c.c_skip, c.c_out) == (1.0, 0.0)


@pytest.mark.parametrize("t", [0.0021, 0.3, 80.0])
def test_a_consistency_network_is_diffusers_own(t):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler, sigma = diffusers.CMStochasticIterativeScheduler(), torch.tensor(t, dtype=torch.float64)
    c = Consistency().coefficients(EDM(), t, 0.0)
    want = [float(v) for v in scheduler.get_scalings_for_boundary_condition(sigma)]
    assert [c.c_skip, c.c_out] == pytest.approx(want, rel=1e-12)
    assert c.c_in == pytest.approx(1 / math.sqrt(t**2 + 0.25), rel=1e-12)
    assert c.c_noise == pytest.approx(float(scheduler.sigma_to_t(t)), rel=1e-12)


def test_consistency_is_the_same_function_on_any_path():
    """Through ``x / alpha`` a VP state is an EDM state at the noise level ``sigma / alpha``."""
    vp, edm = quadratic_betas(), EDM()
    for t in (1.0, 300.0, 1000.0):
        alpha, sigma = vp.alpha_sigma(t)
        a, b = Consistency().coefficients(vp, t, 0.0), Consistency().coefficients(edm, sigma / alpha, 0.0)
        assert (a.c_in * alpha, a.c_skip * alpha, *a[2:]) == pytest.approx(b, rel=1e-11)


@pytest.mark.parametrize(
    ("kind", "inner"), [("epsilon", Eps()), ("v_prediction", V()), ("sample", X0())], ids=lambda v: str(v)
)
def test_lcm_is_diffusers_own(kind, inner):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.LCMScheduler(prediction_type=kind)
    scheduler.set_timesteps(4)
    # theirs is float32: give it the same products in float64
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.tensor(quadratic_betas().betas, dtype=torch.float64), 0)
    x, output = torch.tensor([0.8, -1.1], dtype=torch.float64), torch.tensor([-0.3, 0.4], dtype=torch.float64)
    t = int(scheduler.timesteps[1])  # as a tensor its boundary scalings would be float32
    want = scheduler.step(output, t, x, return_dict=False)[1]
    c = LCM(inner).coefficients(quadratic_betas(), float(t) + 1, 0.0)
    assert torch.allclose(c.c_skip * x + c.c_out * output, want, rtol=1e-12, atol=1e-12)
    assert c.c_noise == c.c_noise_to == float(t)


def test_lcm_is_the_identity_at_timestep_0():
    c = LCM().coefficients(quadratic_betas(), 1.0, 0.0)
    assert (c.c_skip, c.c_out) == (1.0, 0.0)


def test_lcm_wants_a_network_that_does_not_jump():
    with pytest.raises(PlanError, match="inner is"):
        LCM(MeanVelocity())


def test_scm_is_diffusers_own():
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(2, max_timesteps=1.5, intermediate_timesteps=1.3)
    x, raw = torch.tensor([0.8, -1.1], dtype=torch.float64), torch.tensor([-0.3, 0.4], dtype=torch.float64)
    # its pipeline feeds x / sigma_data and scales the output by sigma_data before it calls the scheduler
    scheduler._step_index = 0
    want = scheduler.step(0.5 * raw, scheduler.timesteps[0], x, return_dict=False)[1]
    c = SCM(0.5).coefficients(TrigFlow(0.5), float(scheduler.timesteps[0]), 0.0)
    assert c.c_in == pytest.approx(2.0)
    assert torch.allclose(c.c_skip * x + c.c_out * raw, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["consistency", "lcm", "scm"])
def test_consistency_networks_go_to_the_end_only(name):
    path = TrigFlow() if name == "scm" else quadratic_betas()
    t, s = 0.9 * path.t_start, 0.5 * path.t_start
    PREDICTIONS[name].coefficients(path, t, path.t_end)
    for target in (s, t):
        with pytest.raises(PlanError, match="end of its path only"):
            PREDICTIONS[name].coefficients(path, t, target)


@pytest.mark.parametrize("t_end", [0.0, 0.002])
def test_flow_map_with_gamma_1_is_multistep_consistency_sampling(t_end):
    """Song et al. 2023, algorithm 1: jump to the end, add noise back up to the next time."""
    path, times = EDM(t_end=t_end), (80.0, 24.4, 5.84, t_end)
    for row, after in zip(FlowMap(gamma=1.0).rows(path, times), times[1:], strict=True):
        c = Consistency().coefficients(path, row.t, row.s)
        network, x = 0.3, 11.0
        landed = 0.25 / ((row.t - 0.002) ** 2 + 0.25) * x
        landed += 0.5 * (row.t - 0.002) / math.sqrt(0.25 + row.t**2) * network
        got = row.to_x["x"] * x + row.to_x["denoised"] * (c.c_skip * x + c.c_out * network)
        assert got == pytest.approx(landed, rel=1e-12)
        assert row.to_x.get("n1", 0.0) == pytest.approx(math.sqrt(after**2 - t_end**2), abs=1e-15)


# --- piecewise rectified flows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps", "velocity"])
def test_a_perflow_step_stays_on_the_straight_line_of_its_window(kind):
    """The line joins a state of the trained diffusion at each bound; the network gives the noise between the two."""
    path, trained, x0, z = RectifiedFlow(), quadratic_betas(), 0.4, -1.3
    prediction = PeRFlow(kind, windows=4, trained=trained)
    for start, end in [(1.0, 0.75), (0.75, 0.5), (0.25, 0.0)]:
        alpha_e, sigma_e = trained.alpha_sigma(max(1000 * end, 1))
        alpha_s, sigma_s = trained.alpha_sigma(1000 * start)
        after = alpha_e * x0 + sigma_e * z
        ratio = alpha_s / alpha_e
        before = ratio * after + math.sqrt(1 - ratio**2) * z if kind == "diff_eps" else alpha_s * x0 + sigma_s * z
        line = (before - after) / (start - end)
        for t, s in [(start, end), (start, end + 0.1), (end + 0.1, end), (end + 0.2, end + 0.05)]:
            x = after + (t - end) * line
            d = denoised(prediction, path, x, t, s, line if kind == "velocity" else z)
            r, m = first_order(path, t, s)
            assert r * x + m * d == pytest.approx(after + (s - end) * line, rel=1e-9, abs=1e-11)


def test_a_perflow_step_out_of_its_window_is_refused():
    with pytest.raises(PlanError, match="down to 0.75"):
        PeRFlow().coefficients(RectifiedFlow(), 0.9, 0.7)
    with pytest.raises(PlanError, match="'straight' path"):
        PeRFlow().coefficients(linear_betas(), 900.0, 800.0)
    for options in ({"kind": "eps"}, {"windows": 0}):
        with pytest.raises(PlanError, match="allowed"):
            PeRFlow(**options)


@pytest.mark.parametrize("n", [4, 7, 10])
def test_perflow_walks_its_grid(n):
    """A network that always gives one noise moves the state from bound to bound by DDIM steps, whatever the steps."""
    trained, z = quadratic_betas(), torch.full((1, 1, 2, 2), 0.3)
    start = torch.linspace(-2, 2, 4).view(1, 1, 2, 2)
    found = fastdiff.sample(
        lambda x, t: z, (1, 1, 2, 2), sampler="flow_map", prediction="perflow", grid="perflow",
        num_inference_steps=n, latents=start,
    )  # fmt: skip
    (alpha_t, sigma_t), (alpha_s, sigma_s) = trained.alpha_sigma(1000.0), trained.alpha_sigma(1.0)
    want = alpha_s * (start - sigma_t * z) / alpha_t + sigma_s * z
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["direct_map", "imm", "consistency", "lcm", "scm", "perflow"])
def test_what_is_not_learned_by_regression_says_so(name):
    with pytest.raises(PlanError):
        PREDICTIONS[name].target(DiscreteVP((0.1, 0.2)), 1.0)
