"""Schedulers on the straight path: flow matching."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import tables
from fastdiff.integrations.schedulers.multistep import shifted, stretched
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import Linear, Request, Written, falling, straight
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import MeanVelocity, Velocity
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Row, Solver
from fastdiff.sampling.solvers.base import ddim_weights
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.solvers.flow_map import FlowMap
from fastdiff.sampling.solvers.renoise import Renoise
from fastdiff.sampling.solvers.runge_kutta import heun as heun_solver

# the output points from noise to data
AWAY = Linear(lambda alpha, sigma, told: (1.0, 1.0, sigma))


def euler(options: Options, request: Request) -> Plan:
    """Euler's method, or a fresh start at every step with ``stochastic_sampling``."""
    if not options.flag("stochastic_sampling"):
        return _matched(options, request, DDIM())
    _refuse_inverted(options)
    return _matched(options, request, Renoise())


def lcm(options: Options, request: Request) -> Plan:
    """Consistency sampling: a fresh start at every step."""
    if options["scale_factors"]:
        raise options.refuse("scale_factors", "a step table keeps one image size")
    _refuse_inverted(options)
    return _matched(options, request, Renoise())


def _refuse_inverted(options: Options) -> None:
    if options.flag("invert_sigmas"):
        raise options.refuse("invert_sigmas", "diffusers then takes the noise for the image")


def _matched(options: Options, request: Request, solver: Solver) -> Plan:
    scale = options["num_train_timesteps"]
    sigmas = torch.from_numpy(_sigmas(options, request)).to(torch.float32)
    if options.flag("invert_sigmas"):
        # diffusers' time then rises from noise to data; ours falls, and the network is told theirs
        told = (1.0 - sigmas) * scale
        times = falling(options.name, [*(1.0 - value for value in (1.0 - sigmas).tolist()), 0.0])
        return Plan(straight(times, told.tolist(), scale), AWAY, solver, times)
    times = falling(options.name, [*sigmas.tolist(), 0.0])
    told = (sigmas * scale).tolist()
    if request.timesteps is not None:
        told = torch.tensor(list(request.timesteps), dtype=torch.float32).tolist()
    return Plan(straight(times, told, scale), Velocity(), solver, times)


def _sigmas(options: Options, request: Request) -> np.ndarray:
    total, shift = options["num_train_timesteps"], options["shift"]
    dynamic = options.flag("use_dynamic_shifting")
    if request.mu is not None and not dynamic:
        raise PlanError(f"{options.name} takes mu with use_dynamic_shifting only")
    if request.sigmas is not None:
        sigmas = np.asarray(request.sigmas, dtype=np.float32)
    elif request.timesteps is not None:
        sigmas = np.asarray(request.timesteps, dtype=np.float32) / total
    else:
        ends = torch.linspace(1, total, total, dtype=torch.float32)[[-1, 0]] / total
        if not dynamic:  # the ends are shifted here, and everything between them once more below
            ends = shift * ends / (1 + (shift - 1) * ends)
        sigmas = np.linspace(ends[0].item() * total, ends[1].item() * total, request.counted()) / total
    steps = len(sigmas)
    if request.steps not in (None, steps):
        raise PlanError(f"num_inference_steps is {request.steps}, but the list has {steps} steps")
    sigmas = shifted(options, request.mu, sigmas) if dynamic else shift * sigmas / (1 + (shift - 1) * sigmas)
    if options["shift_terminal"]:
        sigmas = stretched(sigmas, options["shift_terminal"])
    kind = tables.level_kind(options)
    if kind is None:
        return np.asarray(sigmas)
    return tables.spread(kind, options, sigmas[0].item(), sigmas[-1].item(), steps)


def heun(options: Options, request: Request) -> Plan:
    """Heun's method in ``t``."""
    total, shift = options["num_train_timesteps"], options["shift"]
    ends = torch.linspace(1, total, total, dtype=torch.float32)[[-1, 0]] / total
    ends = shift * ends / (1 + (shift - 1) * ends)
    sigmas = np.linspace(ends[0].item() * total, ends[1].item() * total, request.counted()) / total
    sigmas = torch.from_numpy(shift * sigmas / (1 + (shift - 1) * sigmas)).to(torch.float32)
    times = falling(options.name, [*sigmas.tolist(), 0.0])
    return Plan(straight(times, (sigmas * total).tolist(), total), Velocity(), heun_solver(), times)


def flow_map(options: Options, request: Request) -> Plan:
    """A flow map: the network is told where a step starts and where it ends."""
    total, shift = options["num_train_timesteps"], options["shift"]
    if request.sigmas is not None:
        sigmas = np.asarray(request.sigmas, dtype=float)
    elif request.timesteps is not None:
        sigmas = np.asarray(request.timesteps, dtype=float) / total
    else:
        sigmas = torch.linspace(1.0, 0.0, request.counted() + 1, dtype=torch.float64)[:-1].numpy()
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    times = falling(options.name, [*sigmas.tolist(), 0.0])
    return Plan(straight(times, [t * total for t in times], total), MeanVelocity(), FlowMap(), times)


def ltx_ancestral(options: Options, request: Request) -> Plan:
    """Euler's method with ancestral noise, counted in ``t``: each step lands lower and noise brings it back."""
    eta, noise, total = options["eta"], options["s_noise"], options["num_train_timesteps"]
    if request.sigmas is not None or request.timesteps is not None:
        given = request.sigmas if request.sigmas is not None else request.timesteps
        sigmas = torch.tensor(list(given or ()), dtype=torch.float32)
    else:
        plain = np.linspace(float(total), float(torch.tensor(1 / total)) * total, request.counted()) / total
        sigmas = torch.cat([torch.from_numpy(plain).to(torch.float32), torch.zeros(1)])
    times = falling(options.name, sigmas.tolist())
    path = straight(times, (sigmas * total).tolist(), total)
    rows = [_ancestral(path, i, t, s, eta, noise) for i, (t, s) in enumerate(zip(times, times[1:], strict=False))]
    return Plan(path, Velocity(), Written(tuple(rows)), times)


def _ancestral(path: Path, i: int, t: float, s: float, eta: float, noise: float) -> Row:
    down = s * (1 + (s / t - 1) * eta)
    weights = ddim_weights(path, t, down)
    if s == 0 or not (eta > 0 and noise > 0):
        return Row(t, t, weights)
    back = (1 - s) / (1 - down)
    weights = {name: back * weight for name, weight in weights.items()}
    weights["n1"] = noise * math.sqrt(max(s * s - (down * back) ** 2, 0.0))
    return Row(t, t, weights, draws=(i, None))


def minimax(options: Options, request: Request) -> Plan:
    """Euler's method over ``n`` levels, that is ``n - 1`` steps; the network is told ``1 - t`` and points to data."""
    if request.sigmas is not None:
        sigmas = torch.tensor(list(request.sigmas), dtype=torch.float32)
    else:
        base, shift = torch.linspace(1.0, 0.0, request.counted(), dtype=torch.float32), float(options["shift"])
        sigmas = torch.unique_consecutive(shift * base / (1 + (shift - 1) * base))
    if len(sigmas) < 2 or sigmas[-1] != 0:
        raise PlanError(f"{options.name} needs two levels or more, the last of them 0")
    times = falling(options.name, sigmas.tolist())
    return Plan(straight(times, (1.0 - sigmas[:-1]).tolist(), 1.0), AWAY, DDIM(), times)
