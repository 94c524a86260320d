"""The number of steps from an error estimate that costs nothing, and what it promises."""

from __future__ import annotations

import functools

import pytest
import torch
from small import make_folder

import fastdiff
from fastdiff.errors import PlanError
from fastdiff.sampling.analytic import Mixture, network
from fastdiff.sampling.embedded import choose_steps
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.prediction import PREDICTIONS

SHAPE = (4, 1, 3, 3)


@functools.cache
def data() -> Mixture:
    draw = torch.Generator().manual_seed(1)
    return Mixture(torch.randn(4, *SHAPE[1:], generator=draw), 0.5, torch.tensor([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize(("path", "prediction"), [("straight", "velocity"), ("linear", "eps"), ("edm", "edm")])
def test_the_error_keeps_to_the_tolerance(path, prediction):
    given = {"path": path, "prediction": prediction, "seed": 3}
    fn = network(data(), PATHS[path](), PREDICTIONS[prediction])
    truth = fastdiff.sample(fn, SHAPE, sampler="dpmpp_3m", num_inference_steps=400, **given)
    chosen = []
    for tolerance in (0.1, 0.03, 0.01):
        chosen.append(choose_steps(fn, SHAPE, tolerance=tolerance, sampler="unipc", **given))
        x = fastdiff.sample(fn, SHAPE, sampler="unipc", num_inference_steps=chosen[-1], **given)
        errors = (x - truth).square().mean((1, 2, 3)).sqrt() / truth.square().mean((1, 2, 3)).sqrt()
        assert float(errors.max()) < 1.2 * tolerance
    assert chosen[0] < chosen[1] < chosen[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "ddim"}, "allowed: 'unipc'"),
        ({"sampler": "unipc:corrector=false"}, "allowed: 'unipc'"),
        ({"sampler": "unipc:predict_x0=false"}, "allowed: 'unipc'"),
        ({"sampler": "unipc", "timesteps": [900, 400]}, "timesteps"),
        ({"sampler": "unipc", "sigmas": [0.9, 0.4]}, "sigmas"),
        ({"sampler": "unipc", "tolerance": None}, "tolerance is None"),
        ({"sampler": "unipc", "tolerance": -1.0}, "tolerance is -1.0"),
        ({"sampler": "unipc", "tolerance": 1e-9}, "allowed: up to 200"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options, said):
    fn = network(data(), PATHS["straight"](), PREDICTIONS["velocity"])
    with pytest.raises(PlanError, match=said):
        choose_steps(fn, SHAPE, **{"tolerance": 0.1, "seed": 0} | options)


def test_from_a_picture_the_walk_that_is_left_is_judged():
    """Half of the way, from half of the noise, is less wrong than the whole of as many steps: fewer are needed."""
    fn = network(data(), PATHS["straight"](), PREDICTIONS["velocity"])
    image = data().draw(4, torch.Generator().manual_seed(0)).float()
    given = {"sampler": "unipc", "seed": 3, "image": image, "strength": 0.5}
    chosen = [choose_steps(fn, SHAPE, tolerance=tolerance, **given) for tolerance in (0.1, 0.01)]
    truth = fastdiff.sample(fn, SHAPE, num_inference_steps=400, **given | {"sampler": "dpmpp_3m"})
    for steps, tolerance in zip(chosen, (0.1, 0.01), strict=True):
        x = fastdiff.sample(fn, SHAPE, num_inference_steps=steps, **given)
        errors = (x - truth).square().mean((1, 2, 3)).sqrt() / truth.square().mean((1, 2, 3)).sqrt()
        assert float(errors.max()) < 1.2 * tolerance
    assert chosen[0] < chosen[1]


def test_a_walk_that_ends_in_nan_is_refused():
    with pytest.raises(PlanError, match="NaN or infinity"):
        choose_steps(lambda x, t: x * float("nan"), SHAPE, tolerance=0.1, sampler="unipc", seed=0)


def test_pipelines_take_auto(tmp_path):
    pipe = fastdiff.Pipeline.from_pretrained(make_folder(tmp_path / "model"))
    seen = []
    given = {"seed": 1, "sampler": "unipc", "output_type": "pt"}
    images = pipe(0, num_inference_steps="auto", tolerance=0.05, callback_on_step_end=lambda *a: seen.append(a[1]),
                  **given).images  # fmt: skip
    count = len(seen)
    assert 2 <= count <= 200 and torch.equal(images, pipe(0, num_inference_steps=count, **given).images)
    with pytest.raises(PlanError, match="goes with 'auto'"):
        pipe(0, tolerance=0.1, num_inference_steps=4)
    with pytest.raises(PlanError, match="its caller walks"):
        pipe.ready(0, num_inference_steps="auto", tolerance=0.1, sampler="unipc")
