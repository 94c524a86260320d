"""Trajectories against diffusers' schedulers, with the same network, the same noise and the same times."""

from __future__ import annotations

import pytest
import torch

from fastdiff.sampling import PATHS, sample

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
SHAPE, TRAINED = (2, 3, 8, 8), 1000


def network(x, timestep, **_):
    """A smooth, contracting stand-in for a trained network; any output serves to compare two samplers."""
    phase = timestep.to(x.dtype)[:, None, None, None] / TRAINED
    return torch.tanh(0.7 * x + phase) * (0.3 + 0.5 * phase)


def theirs(scheduler, x, generator=None, **options):
    """The loop a user of diffusers writes."""
    extra = {"generator": generator} if generator is not None else {}
    for t in scheduler.timesteps:
        output = network(x, t.reshape(1).expand(x.shape[0]))
        x = scheduler.step(output, t, x, **extra, **options).prev_sample
    return x


BETAS = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}
RANGES = {"scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}}


@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(schedule, prediction, spacing):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=schedule, prediction_type=prediction, timestep_spacing=spacing, clip_sample=False,
        **RANGES.get(schedule, {}),
    )  # fmt: skip
    _compare(scheduler, 10, "ddim", schedule, prediction, spacing)  # diffusers' DDIM needs steps that divide 1000


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise(eta):
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    _compare(scheduler, 10, "ddim", "linear", "epsilon", "leading", eta=eta)


def test_ddpm():
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    _compare(scheduler, 20, "ddpm", "linear", "epsilon", "leading", noise=True)


def test_the_four_schedules_are_diffusers_own():
    for name, ours in {**BETAS, "sigmoid": "sigmoid"}.items():
        scheduler = diffusers.DDPMScheduler(beta_schedule=name, **RANGES.get(name, {}))
        betas = torch.tensor(PATHS[ours]().betas, dtype=torch.float64)
        assert torch.allclose(scheduler.betas.double(), betas, rtol=2e-6, atol=0)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpmpp_2m(prediction, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type=prediction, timestep_spacing="trailing",
        final_sigmas_type="zero",
    )  # fmt: skip
    _compare(scheduler, steps, "dpmpp_2m", "linear", prediction, "trailing")


def test_unipc():
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=2, solver_type="bh2", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    _compare(scheduler, 10, "unipc", "linear", "epsilon", "trailing")


def test_euler_on_the_straight_path():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(15)
    x = torch.randn(SHAPE)
    want = theirs(scheduler, x)
    got = sample(network, SHAPE, latents=x, sampler="ddim", sigmas=scheduler.sigmas.tolist())
    _close(got, want)


def _compare(scheduler, steps, sampler, schedule, prediction, grid, eta=None, noise=False):
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE)
    # the last, noise-free step draws nothing in DDPM, and sigma = 0 there in DDIM: the order of draws is the same
    generator = torch.Generator().manual_seed(3) if noise or eta else None
    want = theirs(scheduler, x, generator, **({"eta": eta} if eta else {}))
    names = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    got = sample(
        network, SHAPE, latents=x, sampler=sampler, path=BETAS[schedule], prediction=names[prediction],
        num_inference_steps=steps, grid=grid, eta=eta,
        generator=torch.Generator().manual_seed(3) if generator else None,
    )  # fmt: skip
    bound = 1e-5
    if prediction == "sample":
        # diffusers re-derives the noise as (x - alpha * x0) / sigma in float32, which loses digits where sigma is small
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
        exact = theirs(scheduler, x.double())
        bound = max(bound, 4 * float((want - exact).abs().max() / exact.abs().max()))
    _close(got, want, bound)


def _close(got, want, bound=1e-5):
    assert float((got - want).abs().max() / want.abs().max()) < bound
