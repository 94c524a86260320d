"""Networks whose second half of channels says how much noise an ancestral step adds."""

from __future__ import annotations

import pytest
import torch

from fastdiff.errors import PlanError
from fastdiff.sampling import Cond, sample
from fastdiff.sampling.denoiser import CallableNetwork, NetworkDenoiser
from fastdiff.sampling.grid import trailing
from fastdiff.sampling.loop import State, advance
from fastdiff.sampling.noise import PhiloxNoise
from fastdiff.sampling.path import linear_betas
from fastdiff.sampling.prediction import Eps
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.table import build, merge

SHAPE = (2, 3, 4, 4)
RUN = {"path": "linear", "prediction": "eps", "num_inference_steps": 6, "seed": 3}
LEARNED = "ddpm:variance=learned_range"


def network(place, channels=2):
    """Noise that depends on the state; ``place`` in [-1, 1] between the least and the most variance."""

    def call(x, timestep, **kept):
        eps = torch.tanh(x + timestep[:, None, None, None] / 1000)
        return torch.cat([eps, *[torch.full_like(x, place)] * (channels - 1)], 1)

    return call


@pytest.mark.parametrize(("place", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_its_ends_are_the_fixed_variances(place, variance):
    got = sample(network(place), SHAPE, sampler=LEARNED, **RUN)
    assert torch.allclose(got, sample(network(place), SHAPE, sampler=f"ddpm:variance={variance}", **RUN), rtol=1e-5)


def test_halfway_its_deviation_is_the_geometric_mean():
    path, times = linear_betas(), (600.0, 300.0, 0.0)
    small, large = (SOLVERS["ddpm"](variance=f"fixed_{size}").rows(path, times)[0] for size in ("small", "large"))
    row = SOLVERS["ddpm"](variance="learned_range").rows(path, times)[0]
    deviation = row.to_x["n1"] * torch.tensor(row.learned).double().exp().item()
    assert deviation == pytest.approx((small.to_x["n1"] * large.to_x["n1"]) ** 0.5)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "ddpm"])
def test_other_samplers_leave_the_second_half_alone(sampler):
    want = sample(network(0.3, channels=1), SHAPE, sampler=sampler, **RUN)
    assert torch.equal(sample(network(0.3), SHAPE, sampler=sampler, **RUN), want)


def test_guidance_takes_the_variance_of_the_conditional_half():
    def told(x, timestep, class_labels):
        place = class_labels[:, None, None, None].float().expand_as(x)
        return torch.cat([torch.tanh(x), place], 1)

    run = RUN | {"sampler": LEARNED, "cond": Cond(torch.tensor([1, 1])), "guidance_scale": 2.0}
    guided = sample(told, SHAPE, uncond=Cond(torch.tensor([-1, -1])), **run)
    # both halves predict the same noise, so nothing but the variance can differ
    plain = sample(lambda x, t: told(x, t, torch.ones(2)), SHAPE, sampler="ddpm:variance=fixed_large", **RUN)
    assert torch.allclose(guided, plain, rtol=1e-5, atol=1e-6)


def test_outside_the_mask_the_noise_is_the_forward_process():
    image, mask = torch.rand(SHAPE) * 2 - 1, torch.zeros(2, 1, 4, 4)
    states = {}
    for name, place in ((LEARNED, 0.7), ("ddpm", 0.0)):
        seen = []
        options = RUN | {"sampler": name, "image": image, "mask_image": mask}
        sample(network(place), SHAPE, **options, callback=lambda i, t, state, seen=seen: seen.append(state.x))
        states[name] = seen
    for learned, fixed in zip(states[LEARNED], states["ddpm"], strict=True):
        assert torch.allclose(learned, fixed, rtol=1e-5, atol=1e-6)


def test_a_batch_mixes_learned_and_fixed_variances():
    path = linear_betas()
    tables = [
        build(path, Eps(), SOLVERS["ddpm"](variance=v), trailing(path, 5)) for v in ("fixed_small", "learned_range")
    ]
    ready = CallableNetwork(network(0.4))
    denoise, prepared = NetworkDenoiser(ready), ready.prepare(Cond(), tables[0].times[None])
    x, index = torch.randn(SHAPE), torch.zeros(2, dtype=torch.int64)
    noise = PhiloxNoise(torch.tensor([5, 6]))

    def step(chosen):
        plan = merge([table.structure.rows[0] for table in chosen])
        return advance(
            denoise, State.start(x, 0), torch.stack([t.values[0] for t in chosen]), index, plan, noise, prepared
        )

    mixed, alone = step(tables), [step([table] * 2) for table in tables]
    assert all(torch.equal(mixed.x[i], alone[i].x[i]) for i in range(2))


def test_a_network_without_a_variance_is_named():
    with pytest.raises(PlanError, match="the network returns 3 channels for 3; a learned variance needs 6"):
        sample(network(0.0, channels=1), SHAPE, sampler=LEARNED, **RUN)
