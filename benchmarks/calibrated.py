"""Calibrated samplers beside every classical one, ours and the peers': problems and scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.benchmarks import accuracy
from fastdiff.benchmarks.accuracy import Problem, Score
from fastdiff.benchmarks.orders import exact
from fastdiff.calibration import Calibration, Settings, calibrate
from fastdiff.calibration.classical import candidates
from fastdiff.calibration.walking import Family, Given, relative
from fastdiff.pipeline import Pipeline
from fastdiff.sampling.analytic import Mixture, fit_mixture, network
from fastdiff.sampling.parts import initial_scale
from fastdiff.sampling.path import PATHS, linear_betas
from fastdiff.sampling.prediction import PREDICTIONS
from fastdiff.sampling.run import sample
from fastdiff.sampling.solvers.non_stationary import NonStationary

LOW = -10.0  # log of sigma / alpha below which the estimate is the solution
FRESH = 1024  # images that judge a random problem
DATA = {"path": "linear", "prediction": "eps"}  # of the mixture


class Case(NamedTuple):
    """A problem, and how it is calibrated.

    All samplers run on ``problem``; the best of them, and the calibrated ones, on ``judge``: the same with so many
    images that a few do not decide.
    """

    problem: Problem
    judge: Problem
    calibrate: Callable[[Sequence[int]], Calibration]


@functools.cache
def fashion(file: str, count: int = 256) -> Case:
    """Ten Gaussians of full covariance fitted to Fashion-MNIST, averaged to 14 by 14, under DDPM's betas.

    Args:
        file: ``fashion_mnist.npz`` with ``train_images [N, 28, 28]``.
        count: images that judge.
    """
    with np.load(file, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["train_images"][:6000])[:, None].double() / 127.5 - 1
    data = fit_mixture(torch.nn.functional.avg_pool2d(images, 2), 10, full=True, floor=1e-3)
    path = linear_betas()
    alpha, sigma = path.alpha_sigma(path.t_start)
    start = torch.randn(count, 1, 14, 14, generator=torch.Generator().manual_seed(3))

    def solve(longest: float) -> Tensor:
        z = exact(data, start.double() / alpha, math.log(sigma / alpha), LOW, longest)
        return data.denoised(z, 1.0, math.exp(LOW))

    truth, coarse = solve(0.2), solve(0.4)
    assert data.bases is not None
    quick = Mixture(data.means.float(), data.std.float(), data.weights.float(), data.bases.float())
    problem = Problem(
        "mixture fitted to Fashion-MNIST",
        "vp",
        path,
        truth,
        float((coarse - truth).square().mean().sqrt() / truth.square().mean().sqrt()),
        lambda x, alpha, sigma: quick.denoised(x.float(), alpha, sigma).to(x.dtype),
        lambda alpha, sigma: start * (alpha * alpha + sigma * sigma) ** 0.5,
        sigma / alpha,
    )
    work = Settings(samples=1024, held_out=256, batch_size=128, teacher_steps=400, iterations=15, share=512)
    fn = network(quick, path, PREDICTIONS["eps"])
    return Case(problem, problem, lambda steps: calibrate(fn, (1, 14, 14), steps=steps, settings=work, **DATA))  # type: ignore[arg-type]


@functools.cache
def digits(count: int = 32, judges: int = 256, steps: int = 256) -> Case:
    """The bundled network as a plain velocity network, without guidance; image ``i`` is of class ``i`` modulo 10.

    A few of its images change their shape at a small error, and hold half of all squares: 32 images do not judge it.
    """
    pipe = Pipeline.from_pretrained("digits")
    assert isinstance(pipe, Pipeline)
    few, many = accuracy.digits_unet(count, steps), accuracy.digits_unet(judges, steps)
    return Case(few, many, lambda steps: calibrate(pipe, steps=steps, guidance_scale=1.0))


def score(problem: Problem, found: Calibration, calls: int) -> Score:
    """The calibrated sampler of so many calls on a problem's own noise."""
    fitted, path = found.fitted[calls], problem.path
    # from the noise itself: a user has no solution to begin at
    noise = problem.first(*path.alpha_sigma(path.t_start)) / initial_scale(path, path.t_start)
    x = noise * fitted.scale * initial_scale(path, fitted.times[0])
    x = accuracy.walked(problem, fitted.solver(), fitted.times, x)
    return Score("calibrated", "calibrated", calls, len(fitted.weights), problem.error(x))


# --- many small problems --------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """One random problem: what was calibrated, and its error over the best classical one on fresh noise."""

    what: str
    calls: int
    ratio: float
    calibrated: bool


KINDS = [("straight", "velocity"), ("straight", "x0"), ("linear", "eps"), ("linear", "v"), ("cosine", "v"),
         ("scaled_linear", "eps"), ("edm", "edm"), ("trigflow", "trigflow"), ("vp_sde", "eps"),
         ("linear", "x0")]  # fmt: skip


def trial(number: int) -> Trial:
    """A mixture, a path, a prediction and a budget, all drawn by a number; judged on noise of its own."""
    draw = torch.Generator().manual_seed(number)
    path, prediction = KINDS[number % len(KINDS)]
    modes, shape = 2 + int(torch.randint(5, (), generator=draw)), (1, 2, 1 + int(torch.randint(3, (), generator=draw)))
    weights = torch.rand(modes, generator=draw) + 0.2
    data = Mixture(
        torch.randn(modes, *shape, generator=draw),
        0.2 + 0.6 * float(torch.rand((), generator=draw)),
        weights / weights.sum(),
    )
    calls = 3 + int(torch.randint(6, (), generator=draw))
    fn = network(data, PATHS[path](), PREDICTIONS[prediction])
    given: dict[str, Any] = {"path": path, "prediction": prediction}
    work = Settings(samples=512, held_out=512, batch_size=256, teacher_steps=200, iterations=8, share=512, seed=number)
    found = calibrate(fn, shape, steps=(calls,), settings=work, **given)
    seeds = list(range(2**50, 2**50 + FRESH))
    truth = sample(fn, (FRESH, *shape), sampler="dpmpp_3m", num_inference_steps=400, seed=seeds, **given)
    family = Family(PATHS[path](), PREDICTIONS[prediction])

    def error(walk: NonStationary) -> float:
        given = Given(family, walk, walk.times, walk.scale)
        return relative([sample(fn, (FRESH, *shape), sampler=given, num_inference_steps=calls, seed=seeds)], [truth])

    classical = min(error(one.walk) for one in candidates(family, calls, ()))
    fitted = found.fitted[calls]
    what = f"{path}, {prediction}, {modes} modes of {data.means[0].numel()} values"
    return Trial(what, calls, error(fitted.solver()) / classical, fitted.calibrated)
