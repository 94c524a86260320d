"""Schedulers of networks distilled to few steps over the trained ones: LCM, TCD and the consistency decoder."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import tables
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import Request, Written, clip, prediction
from fastdiff.integrations.schedulers.trained import CLEAN, Table, whole
from fastdiff.sampling.prediction import EDMPreconditioned
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Row
from fastdiff.sampling.solvers.base import ddim_weights


def distilled_steps(options: Options, request: Request) -> list[int]:
    """Some of the steps a network was distilled at, for LCM and TCD."""
    if request.timesteps is not None:
        return whole(options, request)
    count, total, original = request.counted(), options["num_train_timesteps"], options["original_inference_steps"]
    if not count <= original <= total:
        raise PlanError(f"num_inference_steps is {count}; allowed: up to original_inference_steps, {original}")
    trained = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    places = np.floor(np.linspace(0, len(trained), num=count, endpoint=False)).astype(int)
    return [int(k) for k in trained[places]]


def lcm(options: Options, request: Request) -> Plan:
    """Latent consistency: jump to ``c_skip x + c_out D``, noise it again. The bound is on the D inside."""
    table = Table.of(options, tables.signal(options), options.flag("set_alpha_to_one"))
    steps = distilled_steps(options, request)
    path, rows = table.path(steps), []
    for i, k in enumerate(steps):
        scaled = float(k) * options["timestep_scaling"]
        wide = scaled * scaled + 0.25
        jump = {"denoised": scaled / math.sqrt(wide), "x": 0.25 / wide}
        if i == len(steps) - 1:
            rows.append(Row(table.at(k), table.at(k), jump))
            continue
        alpha, sigma = path.alpha_sigma(table.at(steps[i + 1]))
        weights = {name: alpha * weight for name, weight in jump.items()} | {"n1": sigma}
        rows.append(Row(table.at(k), table.at(k), weights, draws=(i, None)))
    kind = prediction(options, "epsilon", "sample", "v_prediction")
    times = (*(table.at(k) for k in steps), CLEAN)
    return Plan(path, kind, Written(tuple(rows)), times, clip=clip(options, reads_clip=True))


def tcd(options: Options, request: Request) -> Plan:
    """Trajectory consistency: down to a share of the next step, then noise back up. Its class never reads its clips."""
    eta = 0.3 if request.eta is None else request.eta
    if not 0 <= eta <= 1:
        raise PlanError(f"eta is {eta!r}; allowed: 0 to 1")
    table = Table.of(options, tables.signal(options), options.flag("set_alpha_to_one"))
    steps = distilled_steps(options, request)
    path, rows = table.path(steps), []
    for i, (k, following) in enumerate(zip(steps, [*steps[1:], 0], strict=True)):
        t, s = table.at(k), table.at(following)
        # in float32, as diffusers counts: a product just below a whole number decides the step
        middle = table.at(int(torch.floor((1 - eta) * torch.tensor(int(following)))))
        weights = ddim_weights(path, t, middle)
        if eta == 0 or i == len(steps) - 1:
            rows.append(Row(t, t, weights))
            continue
        back = path.alpha_sigma(s)[0] / path.alpha_sigma(middle)[0]
        weights = {name: back * weight for name, weight in weights.items()}
        weights["n1"] = math.sqrt(max(1 - back * back, 0.0))
        rows.append(Row(t, t, weights, draws=(i, None)))
    kind = prediction(options, "epsilon", "sample", "v_prediction")
    return Plan(path, kind, Written(tuple(rows)), (*(table.at(k) for k in steps), table.at(0)))


def consistency_decoder(options: Options, request: Request) -> Plan:
    """The two fixed steps of the consistency decoder, whose output is in EDM's preconditioning."""
    if request.counted() != 2:
        raise PlanError(f"num_inference_steps is {request.steps}; {options.name} has 2")
    filled = replace(options, given=options.given | {"trained_betas": None, "beta_schedule": "squaredcos_cap_v2"})
    table = Table.of(options, torch.cumprod(1.0 - tables.betas(filled), dim=0), clean=True)
    steps = (1008, 512)
    path, times = table.path(steps), (table.at(1008), table.at(512), CLEAN)
    alpha, sigma = path.alpha_sigma(times[1])
    rows = (
        Row(times[0], times[0], {"denoised": alpha, "n1": sigma}, draws=(0, None)),
        Row(times[1], times[1], {"denoised": 1.0}),
    )
    scale = path.alpha_sigma(times[0])[1]
    return Plan(path, EDMPreconditioned(options["sigma_data"]), Written(rows), times, initial_scale=scale)
