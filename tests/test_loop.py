"""The loop asks the device nothing, and gives what a plain loop would."""

from __future__ import annotations

import pytest
import torch

from fastdiff.errors import PlanError, ShapeError
from fastdiff.sampling import Cond, sample
from fastdiff.sampling import iterate as walk
from fastdiff.sampling.denoiser import CallableNetwork, NetworkDenoiser
from fastdiff.sampling.grid import uniform
from fastdiff.sampling.loop import iterate
from fastdiff.sampling.noise import PhiloxNoise
from fastdiff.sampling.path import RectifiedFlow
from fastdiff.sampling.prediction import IMM, MeanVelocity
from fastdiff.sampling.solvers import SOLVERS
from fastdiff.sampling.table import build


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_loop_runs_on_the_meta_device(name, clip):
    """Every host read raises there: this is the proof that the loop makes none."""
    path = RectifiedFlow()
    times = uniform(path, 4)[name == "euler_maruyama" :]  # which cannot start from pure noise
    table = build(path, MeanVelocity(), SOLVERS[name](), times, guidance=2.0, clip=clip, device="meta")
    network = CallableNetwork(lambda x, t, s, class_labels: x * (t - s)[:, None, None, None], two_time=True)
    label = torch.zeros(3, dtype=torch.int64, device="meta")
    prepared = network.prepare(Cond(label).joined(Cond(label)), table.times[None])
    noise = PhiloxNoise(torch.zeros(3, dtype=torch.int64, device="meta"))
    x = torch.empty(3, 2, 4, 4, device="meta")
    states = list(iterate(NetworkDenoiser(network), x, table, noise, prepared))
    assert len(states) == len(table.structure.rows)
    assert states[-1].x.shape == x.shape and states[-1].x.is_meta


def contracting(x, timestep):
    return torch.tanh(0.7 * x + timestep[:, None, None, None] / 1000)


def test_a_walk_resumes_from_a_saved_state():
    """Pause after every row, history and noise included, and go on: the same bits."""
    options = {"sampler": "dpmpp_3m_sde", "path": "linear", "num_inference_steps": 6, "seed": 5}
    saved = []
    whole = sample(contracting, (2, 1, 4, 4), **options, callback=lambda i, t, state: saved.append((i + 1, state)))
    for resume in saved:
        assert torch.equal(sample(contracting, (2, 1, 4, 4), **options, resume=resume), whole)


def test_a_walk_row_by_row_is_the_sample():
    """And it can be left and taken up again; bad input is named before the first step."""
    options = {"sampler": "dpmpp_2m_sde", "path": "linear", "num_inference_steps": 6, "seed": 5}
    whole = sample(contracting, (2, 1, 4, 4), **options)
    steps = list(walk(contracting, (2, 1, 4, 4), **options))
    assert [step.index for step in steps] == list(range(6)) and steps[0].timestep == 999.0
    assert torch.equal(steps[-1].state.x, whole)
    *_, last = walk(contracting, (2, 1, 4, 4), **options, resume=(3, steps[2].state))
    assert torch.equal(last.state.x, whole)
    with pytest.raises(PlanError, match="unknown sampler"):
        walk(contracting, (2, 1, 4, 4), sampler="ddom")
    with pytest.raises(PlanError, match="no callback"):
        walk(contracting, (2, 1, 4, 4), callback=print)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "dpmpp_2m_sde", "heun", "er_sde", "lcm"])
def test_inpainting_keeps_the_image_outside_the_mask(name):
    image = torch.rand(2, 1, 4, 4) * 2 - 1
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    options = {"sampler": name, "num_inference_steps": 6, "seed": 3, "prediction": "x0"}
    got = sample(contracting, image.shape, image=image, mask_image=mask, **options)
    assert torch.allclose(got[:, :, 2:], image[:, :, 2:], atol=1e-6)
    free = sample(contracting, image.shape, **options)
    assert torch.allclose(got[:, :, :2], free[:, :, :2], atol=1e-5)  # this network looks at one pixel at a time


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "heun"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_may_show_the_network_the_noised_image(name, strength):
    """As diffusers does; without fresh noise, and started from the noised image, it is the same as the other way."""
    image, mask = torch.rand(2, 1, 4, 4) * 2 - 1, torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    options = {"sampler": name, "num_inference_steps": 6, "seed": 3, "prediction": "x0", "strength": strength}
    shown = sample(contracting, image.shape, image=image, mask_image=mask, keep="noise", **options)
    assert torch.allclose(shown[:, :, 2:], image[:, :, 2:], atol=1e-6)
    if name != "dpmpp_2m_sde":  # this network looks at one pixel at a time
        other = sample(contracting, image.shape, image=image, mask_image=mask, **options)
        assert torch.allclose(shown, other, atol=1e-5)
    with pytest.raises(PlanError, match="keep is 'all'"):
        sample(contracting, image.shape, image=image, mask_image=mask, keep="all", **options)


def test_inpainting_holds_the_forward_process_on_the_way():
    """Outside the mask the state is the image noised by the noise it started with."""
    image, noise = torch.rand(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    states = []
    sample(
        contracting, image.shape, image=image, mask_image=torch.zeros(1, 1, 4, 4), latents=noise, sampler="dpmpp_2m",
        num_inference_steps=4, prediction="x0", callback=lambda i, t, state: states.append(state.x),
    )  # fmt: skip
    for i, x in enumerate(states, start=1):
        assert torch.allclose(x, image * i / 4 + noise * (1 - i / 4), atol=1e-6)


@pytest.mark.parametrize(
    ("path", "prediction", "sampler", "grid"),
    [
        ("linear", "eps", "dpmpp_2m", "trailing"),
        ("scaled_linear", "eps", "unipc", "gits_sd15"),
        ("linear_zero_snr", "v", "ddim", "trailing"),
        ("vp_sde", "score", "heun", None),
        ("edm", "edm", "dpmpp_3m", "karras"),
        ("straight", "velocity", "deis", "linear_quadratic"),
        ("trigflow", "trigflow", "res_multistep", None),
        ("straight", "mean_velocity", "flow_map:gamma=0.5", None),
        ("straight", "shortcut", "flow_map", None),
        ("edm", "consistency", "flow_map:gamma=1", None),
        ("trigflow", "scm", "flow_map:gamma=1", None),
        ("straight", IMM(form="euler_fm"), "flow_map", None),
        ("quadratic", "lcm", "flow_map:gamma=1", "lcm"),
        ("quadratic", "eps", "lcm", "trailing"),
        ("quadratic", "eps", "tcd", "lcm"),
        ("straight", "perflow", "flow_map", "perflow"),
    ],
    ids=str,
)
def test_what_the_docs_name_for_each_network_runs(path, prediction, sampler, grid):
    """docs/SAMPLERS.md, "What to name for which network"."""
    parts = {"path": path, "prediction": prediction, "sampler": sampler, "grid": grid}
    got = sample(lambda x, *told: torch.tanh(x), (1, 1, 4, 4), **parts, num_inference_steps=4, seed=1)
    assert bool(got.isfinite().all()) and 1e-3 < float(got.abs().max()) < 1e3


def test_image_to_image_walks_the_last_part():
    image, told = torch.rand(1, 1, 4, 4), []
    options = {"num_inference_steps": 10, "sampler": "ddim", "seed": 1}
    sample(contracting, image.shape, image=image, strength=0.35, **options, callback=lambda i, t, s: told.append(t))
    assert told == pytest.approx([300, 200, 100])
    with pytest.raises(PlanError, match="0.05.*allowed: 0.1 to 1"):
        sample(contracting, image.shape, image=image, strength=0.05, **options)
    with pytest.raises(PlanError, match="give image"):
        sample(contracting, image.shape, strength=0.5, **options)
    with pytest.raises(ShapeError, match="mask_image is"):
        sample(contracting, image.shape, image=image, mask_image=torch.zeros(1, 1, 2, 2), **options)


def test_a_samplers_name_may_carry_options():
    options = {"shape": (1, 1, 4, 4), "path": "linear", "num_inference_steps": 5, "seed": 1}
    spelled = sample(contracting, **options, sampler="unipc:order=3,corrector=false,solver_type=bh1")
    solver = SOLVERS["unipc"](order=3, corrector=False, solver_type="bh1")
    assert torch.equal(spelled, sample(contracting, **options, sampler=solver))
    with pytest.raises(PlanError, match="no option 'speed'.*order, corrector"):
        sample(contracting, **options, sampler="unipc:speed=9")
    with pytest.raises(PlanError, match="eta is 'loud'"):
        sample(contracting, **options, sampler="ddim:eta=loud")


def test_meta_would_catch_a_host_read():
    with pytest.raises(RuntimeError):
        float(torch.empty((), device="meta"))


def test_guidance_mixes_the_two_estimates():
    calls = []

    def network(x, timestep, class_labels):
        calls.append(x.shape[0])
        return class_labels.float()[:, None, None, None].expand_as(x)

    ones, zeros = torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    x = torch.randn(2, 1, 3, 3)
    got = sample(
        network, x.shape, latents=x, num_inference_steps=1, sampler="ddim", guidance_scale=3.0,
        cond=Cond(ones), uncond=Cond(zeros),
    )  # fmt: skip
    assert torch.allclose(got, x - 3.0)  # velocity 0 + 3 * (1 - 0), one Euler step of length 1
    assert calls == [4]


def test_rows_outside_the_guidance_interval_cost_one_network_row():
    calls = []

    def network(x, timestep, class_labels):
        calls.append(x.shape[0])
        return x

    label = Cond(torch.zeros(2, dtype=torch.int64))
    sample(
        network, (2, 1, 3, 3), num_inference_steps=4, sampler="ddim", seed=0, cond=label, uncond=label,
        guidance_scale=lambda t: 2.0 if 0.4 < t < 0.8 else 1.0,
    )  # fmt: skip
    assert calls == [2, 4, 4, 2]


def test_the_same_seed_gives_the_same_image_in_any_batch():
    def network(x, timestep):
        return torch.tanh(x) * timestep[:, None, None, None] / 1000

    both = sample(network, (3, 1, 4, 4), sampler="ddpm", seed=[5, 6, 7])
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(both[i : i + 1], sample(network, (1, 1, 4, 4), sampler="ddpm", seed=seed))


BAD = [
    ({"sampler": "dimm"}, PlanError, "unknown sampler 'dimm'"),
    ({"num_inference_steps": 0}, PlanError, "num_inference_steps is 0"),
    ({"guidance_scale": 2.0}, PlanError, "unconditional"),
    ({"latents": torch.full((1, 1, 4, 4), float("nan"))}, ShapeError, "NaN"),
    ({"latents": torch.zeros(1, 1, 4, 5)}, ShapeError, "needed"),
    ({"seed": -1}, PlanError, "seed is -1"),
    ({"seed": [1, 2]}, ShapeError, "2 seeds for a batch of 1"),
    ({"prediction": "eps"}, PlanError, "alpha is 0"),
    ({"sampler": "flow_map"}, PlanError, "needs a network that jumps"),
    ({"eta": 0.5}, PlanError, "takes no option 'eta'"),
    ({"timesteps": [500, 700]}, PlanError, "fall strictly"),
    ({"timesteps": [5000]}, PlanError, "allowed: 1.0 to 0.0"),
    ({"path": "curved"}, PlanError, "unknown path"),
    ({"clip": -1.0}, PlanError, "clip is -1.0"),
    ({"grid": "leading"}, PlanError, "counts trained steps"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        sample(lambda x, timestep: x, (1, 1, 4, 4), **options)
