"""Schedulers that walk over noise levels ``sigma / alpha``: Euler, Heun, DPM-Solver, DEIS, UniPC, SA-Solver and kin.

Diffusers walks most of them in ``x / alpha``. The same walk in ``x`` itself has the same weights times ``alpha``, and
keeps its digits where the level is large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import tables
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import Request, Written, angle, circle, clip, falling, prediction, unrounded
from fastdiff.sampling.prediction import Prediction
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.solvers.adams import lms as lms_solver
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.solvers.dpmpp import DPMppSDE
from fastdiff.sampling.solvers.runge_kutta import heun as heun_solver
from fastdiff.sampling.solvers.singlestep import dpm_2s

FINAL = {"zero": "zero", "sigma_min": "sigma_min"}


def euler(options: Options, request: Request) -> Plan:
    """Euler's method."""
    kind = prediction(options, "epsilon", "sample", "original_sample", "v_prediction")
    products = tables.signal(options, divides=True)
    table = tables.levels(products)
    log_table = np.log(table)
    if request.sigmas is not None:
        levels = np.asarray(request.sigmas, dtype=np.float32)
        told = [tables.step_of(level, log_table) for level in levels[:-1]]
    else:
        timesteps, levels = _levels(options, request, table, log_table)
        last = 0.0
        if options.choose("final_sigmas_type", FINAL) == "sigma_min":
            last = unrounded(float(levels[-1]), float(table[0]))
        told, levels = list(timesteps), np.concatenate([levels, [last]]).astype(np.float32)
        levels = levels[: len(told) + 1]  # log_linear makes one level more than there are steps
    continuous = options.choose("timestep_type", {"discrete": False, "continuous": True})
    if continuous and options["prediction_type"] == "v_prediction":
        told = (0.25 * np.log(levels[:-1])).tolist()
    plan = _plan(options, kind, DDIM(), levels, told, log_table)
    end = plan.path.alpha_sigma(plan.times[-1])[0]
    if end == 1:
        return plan
    rows = list(plan.solver.rows(plan.path, plan.times))
    # diffusers returns x / alpha, which is x only where no noise is left
    rows[-1] = rows[-1]._replace(to_x={name: weight / end for name, weight in rows[-1].to_x.items()})
    return plan._replace(solver=Written(tuple(rows)))


def _levels(
    options: Options, request: Request, table: np.ndarray, log_table: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and levels of the classes that are told fractions of steps; the level that a run ends at is not there."""
    kind = tables.level_kind(options) if options.has("use_karras_sigmas") else None
    if request.timesteps is not None:
        if kind:
            raise PlanError(f"{options.name} takes no timesteps where its settings spread the levels ({kind})")
        timesteps = np.asarray(request.timesteps, dtype=np.float32)
        steps = len(timesteps)
    else:
        steps = request.counted()
        timesteps = tables.spaced_finely(options, steps)
    levels = tables.interpolate(timesteps, table)
    if options.has("interpolation_type"):
        log_linear = options.choose("interpolation_type", {"linear": False, "log_linear": True})
        if log_linear:
            levels = torch.linspace(np.log(table[-1]), np.log(table[0]), steps + 1).exp().numpy()
    if kind:
        levels = tables.spread(kind, options, levels[0].item(), levels[-1].item(), steps)
        timesteps = np.array([tables.step_of(level, log_table) for level in levels])
        if kind == "karras" and options.name.startswith("KDPM2"):
            timesteps = timesteps.round()
    return timesteps, levels


def _plan(
    options: Options,
    kind: Prediction,
    solver: Solver,
    levels: np.ndarray,
    told: Sequence[float],
    log_table: np.ndarray,
) -> Plan:
    times = falling(options.name, [angle(float(level)) for level in levels])
    path = circle(times, [float(np.float32(value)) for value in told], lambda level: tables.step_of(level, log_table))
    # where steps are counted from the clean end, diffusers starts at the deviation of noisy data, else at the level
    leading = options["timestep_spacing"] == "leading"
    scale = 1.0 if leading else path.alpha_sigma(times[0])[1]
    bound = clip(options, reads_clip=options.has("clip_sample"))
    return Plan(path, kind, solver, times, initial_scale=scale, clip=bound)


def _to_clean(options: Options, request: Request, solver: Solver, *predictions: str, divides: bool = False) -> Plan:
    kind = prediction(options, *predictions)
    table = tables.levels(tables.signal(options, divides))
    log_table = np.log(table)
    timesteps, levels = _levels(options, request, table, log_table)
    levels = np.concatenate([levels, [0.0]]).astype(np.float32)
    return _plan(options, kind, solver, levels, list(timesteps), log_table)


def euler_ancestral(options: Options, request: Request) -> Plan:
    """Euler's method with ancestral noise."""
    return _to_clean(options, request, DDIM(1.0), "epsilon", "v_prediction", divides=True)


def heun(options: Options, request: Request) -> Plan:
    """Heun's method in ``sigma / alpha``."""
    return _to_clean(options, request, heun_solver("ratio"), "epsilon", "sample", "v_prediction")


def lms(options: Options, request: Request) -> Plan:
    """Linear multistep of order 4."""
    return _to_clean(options, request, lms_solver(4), "epsilon", "sample", "v_prediction")


def kdpm2(options: Options, request: Request) -> Plan:
    """DPM-Solver-2."""
    return _to_clean(options, request, dpm_2s(), "epsilon", "v_prediction")


def kdpm2_ancestral(options: Options, request: Request) -> Plan:
    """DPM-Solver-2 with ancestral noise.

    The middle of its steps is the level that the next one starts at, where diffusers tells the network the fraction of
    a step, and next time the whole one that it rounds Karras' levels to. A time beside it keeps the two apart.
    """
    plan = _to_clean(options, request, dpm_2s(eta=1.0), "epsilon", "v_prediction")
    rows = list(plan.solver.rows(plan.path, plan.times))
    for i in range(1, len(rows)):
        if not rows[i - 1].ends:
            beside = rows[i].t * (1 + 1e-12)
            rows[i] = rows[i]._replace(t=beside, s=beside)
    return plan._replace(solver=Written(tuple(rows), plan.solver.history))


def dpmpp_sde(options: Options, request: Request) -> Plan:
    """SDE-DPM-Solver++ of two stages. Its seed of a Brownian tree has no counterpart here."""
    return _to_clean(options, request, DPMppSDE(1.0), "epsilon", "v_prediction")
