"""Schedulers with a preconditioning of their own: EDM's, Stable Audio's, and consistency models'."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers.multistep import ALGORITHMS, dpm_solver
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import Linear, Request, Told, Written, clip, exploding, falling, unrounded
from fastdiff.sampling.clipping import Clip
from fastdiff.sampling.path import TrigFlow
from fastdiff.sampling.prediction import EDMPreconditioned, Prediction, TrigPreconditioned
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Row, Solver
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.solvers.renoise import Renoise


def edm_euler(options: Options, request: Request) -> Plan:
    """Euler's method on EDM's path."""
    ramp = torch.linspace(0, 1, request.counted(), dtype=torch.float64)
    if request.sigmas is not None:
        raise PlanError(f"{options.name} reads sigmas as places between its ends; give num_inference_steps")
    levels = _levels(options, ramp)
    return _edm(options, levels, DDIM(), levels[-1].item())


def edm_dpm(options: Options, request: Request) -> Plan:
    """DPM-Solver++ multistep on EDM's path."""
    allowed = {name: pair for name, pair in ALGORITHMS.items() if pair[0] == "data"}
    predicts, eta = options.choose("algorithm_type", allowed)
    if eta and options["solver_order"] == 3:
        raise options.refuse("solver_order", "diffusers has no third order of 'sde-dpmsolver++' here")
    steps = request.counted()
    ends_clean = options.choose("final_sigmas_type", {"zero": True, "sigma_min": False})
    solver = dpm_solver(options, predicts, eta, steps, ends_clean)
    levels = _levels(options, torch.linspace(0, 1, steps))
    return _edm(options, levels, solver, options["sigma_min"], bound=clip(options))


def cosine_dpm(options: Options, request: Request) -> Plan:
    """SDE-DPM-Solver++ of Stable Audio, told an angle. Its Brownian tree gives other draws of the same noise."""
    if options["solver_order"] not in (1, 2):
        raise options.refuse("solver_order", "allowed: 1, 2")
    steps = request.counted()
    ends_clean = options.choose("final_sigmas_type", {"zero": True, "sigma_min": False})
    solver = dpm_solver(options, "data", 1.0, steps, ends_clean)
    levels = _levels(options, torch.linspace(0, 1, steps))
    return _edm(options, levels, solver, options["sigma_min"], told=levels.atan() / math.pi * 2)


def _levels(options: Options, ramp: Tensor) -> Tensor:
    """EDM's levels, ``[steps]`` float32. Source: Karras et al. 2022, arXiv:2206.00364, eq. 5."""
    low, high = options["sigma_min"], options["sigma_max"]
    if options.choose("sigma_schedule", {"karras": False, "exponential": True}):
        return torch.linspace(math.log(low), math.log(high), len(ramp)).exp().flip(0).to(torch.float32)
    start, end = high ** (1 / options["rho"]), low ** (1 / options["rho"])
    return torch.pow(start + ramp * (end - start), options["rho"]).to(torch.float32)


def _edm(
    options: Options,
    levels: Tensor,
    solver: Solver,
    lowest: float,
    told: Tensor | None = None,
    bound: Clip | None = None,
) -> Plan:
    """The plan of a run over levels that ends at clean data, or at the lowest level."""
    data = options["sigma_data"]
    kinds: dict[str, Prediction] = {
        "epsilon": EDMPreconditioned(data),
        "v_prediction": TrigPreconditioned(data),  # the other sign
    }
    kind = options.choose("prediction_type", kinds)
    ends_clean = options.choose("final_sigmas_type", {"zero": True, "sigma_min": False})
    times = falling(options.name, [*levels.tolist(), 0.0 if ends_clean else unrounded(levels[-1].item(), lowest)])
    told = 0.25 * torch.log(levels) if told is None else told
    scale = math.sqrt(options["sigma_max"] ** 2 + 1)
    return Plan(exploding(times, told.tolist()), kind, solver, times, initial_scale=scale, clip=bound)


def consistency(options: Options, request: Request) -> Plan:
    """Consistency models: jump to ``sigma_min``, clip, noise again."""
    total, low, data = options["num_train_timesteps"], options["sigma_min"], options["sigma_data"]
    if request.timesteps is not None:
        steps = np.asarray(request.timesteps, dtype=np.int64)
        if bool((np.diff(steps) >= 0).any()) or steps[0] >= total or steps[-1] < 0:
            raise PlanError(f"timesteps are {list(request.timesteps)}; allowed: falling, below {total}")
    else:
        count = request.counted()
        if count > total:
            raise PlanError(f"num_inference_steps is {count}; {options.name} has {total} trained steps")
        steps = (np.arange(count) * (total // count))[::-1]
    rho, high = options["rho"], options["sigma_max"]
    start, end = high ** (1 / rho), low ** (1 / rho)
    ramp = steps[::-1] / max(total - 1, 1)
    sigmas = (start + ramp * (end - start)) ** rho
    told = 1000 * 0.25 * np.log(sigmas + 1e-44)
    times = falling(options.name, np.concatenate([sigmas, [low]]).astype(np.float32).tolist())
    rows = []
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        noise = math.sqrt(max(min(max(s, low), high) ** 2 - low**2, 0.0)) * options["s_noise"]
        drawn = noise > 0 and len(times) > 2
        rows.append(Row(t, t, {"denoised": 1.0} | ({"n1": noise} if drawn else {}), draws=(i if drawn else None, None)))

    def boundary(alpha: float, sigma: float, told: float) -> tuple[float, float, float]:
        wide, above = math.hypot(sigma, data), sigma - low
        return 1 / wide, data * data / (above * above + data * data), above * data / wide

    bound = 1.0 if options.flag("clip_denoised") else None
    return Plan(exploding(times, told), Linear(boundary), Written(tuple(rows)), times, float(high), bound)


def scm(options: Options, request: Request) -> Plan:
    """Continuous-time consistency on the circle. The pipelines divide by ``sigma_data`` around the network; we do not.

    Two steps stop at 1.3, as in diffusers; other numbers are spread evenly.
    """
    options.choose("prediction_type", {"trigflow": None})
    top = 1.5708
    if request.timesteps is not None:
        told = torch.tensor(list(request.timesteps), dtype=torch.float32)
    elif request.counted() == 2:
        told = torch.tensor([top, 1.3, 0.0])
    else:
        told = torch.linspace(top, 0, request.counted() + 1)
    path = TrigFlow(options["sigma_data"])
    times = falling(options.name, [min(t, math.pi / 2) for t in told.tolist()])
    kind = Linear(lambda alpha, sigma, told: (1.0, math.cos(told), -math.sin(told)))
    walked = Told(path, dict(zip(times, told.tolist(), strict=True)))
    return Plan(walked, kind, Renoise(), times)
