"""The exact networks agree with what defines them: densities, conditional means, the ODE."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.errors import PlanError, ShapeError
from fastdiff.sampling import sample
from fastdiff.sampling.analytic import Gaussian, Mixture, Oracle, exact_output, fit_mixture, network
from fastdiff.sampling.denoiser import NetworkDenoiser
from fastdiff.sampling.grid import uniform
from fastdiff.sampling.loop import sample as walk
from fastdiff.sampling.path import EDM, OrnsteinUhlenbeck, RectifiedFlow, linear_betas
from fastdiff.sampling.prediction import PREDICTIONS, MeanVelocity, Velocity, first_order
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.table import build

SHAPE = (1, 1, 3)
PLACES = [(1.0, 0.0), (0.9, 0.1), (0.4, 0.8), (0.0, 1.0), (1.0, 7.0)]
PATHS = {"straight": RectifiedFlow(), "vp": linear_betas(), "edm": EDM(), "ou": OrnsteinUhlenbeck()}


def _covariance(seed):
    root = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + 0.1 * torch.eye(3)


def _means():
    return torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MIXTURES = {
    "isotropic": Mixture(_means(), 0.4, WEIGHTS),
    "diagonal": Mixture(_means(), torch.rand(2, *SHAPE, dtype=torch.float64) + 0.2, WEIGHTS),
    "full": Mixture.from_covariances(_means(), torch.stack([_covariance(1), _covariance(2)]), WEIGHTS),
}
GAUSSIANS = {
    "diagonal": Gaussian(_means()[0], torch.tensor([[[0.3, 0.7, 1.2]]], dtype=torch.float64)),
    "full": Gaussian.from_covariance(_means()[0], _covariance(1)),
}


def _x(count=4):
    return torch.randn(count, *SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("data", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize(("alpha", "sigma"), PLACES)
def test_the_score_is_the_gradient_of_the_log_density(data, alpha, sigma):
    x = _x().requires_grad_()
    gradient = torch.autograd.grad(data.log_density(x, alpha, sigma).sum(), x)[0]
    assert torch.allclose(data.score(x, alpha, sigma), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "data", [*MIXTURES.values(), *GAUSSIANS.values()], ids=[*MIXTURES, *("g_" + n for n in GAUSSIANS)]
)
@pytest.mark.parametrize(("alpha", "sigma"), PLACES)
def test_denoised_and_score_obey_tweedie(data, alpha, sigma):
    x = _x()
    assert torch.allclose(
        alpha * data.denoised(x, alpha, sigma), x + sigma**2 * data.score(x, alpha, sigma), atol=1e-11
    )


def test_the_density_of_a_full_mixture_is_that_of_torch():
    data, (alpha, sigma), x = MIXTURES["full"], (0.8, 0.5), _x()
    covariances = torch.stack([_covariance(1), _covariance(2)])
    normal = torch.distributions.MultivariateNormal(
        alpha * data.means.flatten(1), alpha**2 * covariances + sigma**2 * torch.eye(3)
    )
    expected = (WEIGHTS.log() + normal.log_prob(x.flatten(1)[:, None])).logsumexp(1)
    assert torch.allclose(data.log_density(x, alpha, sigma), expected, rtol=1e-12)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_mixture_of_one_is_a_gaussian(name):
    one = GAUSSIANS[name]
    bases = None if one.basis is None else one.basis[None]
    data, x = Mixture(one.mean[None], one.std[None], torch.ones(1, dtype=torch.float64), bases), _x()
    for place in PLACES:
        assert torch.allclose(data.denoised(x, *place), one.denoised(x, *place), atol=1e-13)
        assert torch.allclose(data.score(x, *place), one.score(x, *place), atol=1e-11)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("data", GAUSSIANS.values(), ids=GAUSSIANS)
def test_the_flow_follows_the_velocity(data, path):
    """Central differences of the flow map in time are the velocity."""
    t = path.time(0.3)
    step, x = 1e-4 * t, _x()
    slope = (data.flow(path, x, t, t + step) - data.flow(path, x, t, t - step)) / (2 * step)
    velocity = data.velocity(path, x, t)
    assert torch.allclose(slope, velocity, atol=1e-5 * float(velocity.abs().max()))


@pytest.mark.parametrize(
    "data", [*MIXTURES.values(), *GAUSSIANS.values()], ids=[*MIXTURES, *("g_" + n for n in GAUSSIANS)]
)
def test_drawn_images_have_the_moments_of_the_data(data):
    drawn = data.draw(40_000, torch.Generator().manual_seed(0)).flatten(1)
    if isinstance(data, Gaussian):
        means, weights, stds, bases = data.mean[None], torch.ones(1).double(), data.std[None], data.basis
        bases = None if bases is None else bases[None]
    else:
        means, weights, stds, bases = data.means, data.weights, data.std, data.bases
    means, variances = means.flatten(1), torch.diag_embed(stds.flatten(1) ** 2)
    if bases is not None:
        variances = bases @ variances @ bases.mT
    mean = weights @ means
    second = (weights[:, None, None] * (variances + means[:, :, None] * means[:, None])).sum(0)
    assert torch.allclose(drawn.mean(0), mean, atol=0.03)
    assert torch.allclose(torch.cov(drawn.T), second - torch.outer(mean, mean), atol=0.06)


@pytest.mark.parametrize("kind", [name for name, prediction in PREDICTIONS.items() if not prediction.jumps])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_plain_function_is_the_oracle(kind, path):
    """float32 timesteps are all that tells them apart."""
    prediction, data = PREDICTIONS[kind], MIXTURES["full"]
    times = tuple(path.time(v) for v in (-1.0, 0.0, 1.0))
    solver = DDIM()
    table = build(path, prediction, solver, times, dtype=torch.float64)
    x = _x()
    exact = walk(NetworkDenoiser(Oracle(data, path, prediction, [solver.rows(path, times)])), x, table, None, None)
    fn, state = network(data, path, prediction), x
    for row in solver.rows(path, times):
        c = prediction.coefficients(path, row.t, row.s)
        denoised = c.c_skip * state + c.c_out * fn(c.c_in * state, torch.full((4,), path.timestep(row.t)).float())
        state = row.to_x["x"] * state + row.to_x["denoised"] * denoised
    assert torch.allclose(state, exact, atol=1e-5)


def test_the_plain_function_serves_fastdiff_sample():
    data = GAUSSIANS["diagonal"]
    got = sample(
        network(data, RectifiedFlow(), MeanVelocity()), (3, *SHAPE), sampler="flow_map", num_inference_steps=2,
        prediction="mean_velocity", latents=(x := torch.randn(3, *SHAPE)),
    )  # fmt: skip
    assert torch.allclose(got.double(), data.flow(RectifiedFlow(), x.double(), 1.0, 0.0), atol=1e-5)


# the windows of perflow are its own: its states are not on the path that it is walked on
@pytest.mark.parametrize("kind", [name for name, p in PREDICTIONS.items() if p.jumps and name != "perflow"])
@pytest.mark.parametrize("data", GAUSSIANS.values(), ids=GAUSSIANS)
def test_the_exact_jump_lands_on_the_flow(kind, data):
    path, prediction, x = linear_betas(), PREDICTIONS[kind], _x()
    t, s = path.time(-0.5), path.t_end
    c = prediction.coefficients(path, t, s)
    denoised = c.c_skip * x + c.c_out * exact_output(data, path, prediction, x, t, s)
    r, m = first_order(path, t, s)
    assert torch.allclose(r * x + m * denoised, data.flow(path, x, t, s), atol=1e-13)


def test_one_time_networks_that_jump_know_their_target():
    data, path, prediction, x = GAUSSIANS["full"], linear_betas(), PREDICTIONS["scm"], _x()
    c_in = prediction.coefficients(path, 500.0, path.t_end).c_in
    output = network(data, path, prediction)(c_in * x, path.timestep(500.0))
    assert torch.allclose(output, exact_output(data, path, prediction, x, 500.0, path.t_end), atol=1e-12)


def test_networks_told_something_else_need_an_oracle():
    for kind in ("consistency", "shortcut"):
        with pytest.raises(PlanError, match="Oracle"):
            network(GAUSSIANS["full"], linear_betas(), PREDICTIONS[kind])


def test_images_at_different_times_are_each_answered():
    fn, x = network(MIXTURES["full"], RectifiedFlow(), Velocity()), _x(2)
    both = fn(x, torch.tensor([300.0, 700.0], dtype=torch.float64))
    assert torch.allclose(both, torch.cat([fn(x[:1], 300.0), fn(x[1:], 700.0)]), atol=1e-15)


def test_only_gaussians_have_a_flow_map():
    with pytest.raises(PlanError, match="Gaussian"):
        network(MIXTURES["full"], RectifiedFlow(), MeanVelocity())
    oracle = Oracle(MIXTURES["full"], RectifiedFlow(), MeanVelocity(), ())
    with pytest.raises(PlanError, match="Gaussian"):
        oracle.output(_x(), 0.5, 0.2)


def test_a_covariance_must_be_positive_definite():
    with pytest.raises(PlanError, match="above 0"):
        Gaussian.from_covariance(_means()[0], torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("full", [False, True])
def test_a_fitted_mixture_recovers_what_it_was_fitted_to(full):
    pytest.importorskip("sklearn", reason="fitting needs scikit-learn (pip install 'fastdiff[test]')")
    means = torch.tensor([[-2.0, 0.0, 1.0], [2.0, 1.0, -1.0]], dtype=torch.float64).view(2, *SHAPE)
    truth = Mixture(means, 0.3, WEIGHTS)
    fitted = fit_mixture(truth.draw(4000, torch.Generator().manual_seed(1)), 2, full=full)
    order = fitted.weights.argsort()
    assert torch.allclose(fitted.weights[order], WEIGHTS, atol=0.03)
    assert torch.allclose(fitted.means[order], means, atol=0.05)
    assert torch.allclose(fitted.std, truth.std, atol=0.03)
    assert fitted.means.dtype == torch.float64
    assert math.isfinite(float(fitted.score(_x(), 1.0, 0.0).sum()))


def test_a_fit_needs_images_enough():
    pytest.importorskip("sklearn", reason="fitting needs scikit-learn (pip install 'fastdiff[test]')")
    with pytest.raises(ShapeError, match="components"):
        fit_mixture(torch.zeros(2, 1, 2, 2), 3)


def test_uniform_grids_reach_both_ends():
    """At the noisy end alpha is 0, at the clean end sigma is: estimate, score and velocity stay finite."""
    path = RectifiedFlow()
    for t in (uniform(path, 2)[0], uniform(path, 2)[-1]):
        for data in (*MIXTURES.values(), *GAUSSIANS.values()):
            assert bool(torch.isfinite(data.velocity(path, _x(), t)).all())
