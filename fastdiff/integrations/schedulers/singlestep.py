"""Single-step DPM-Solver and the multistep one walked upwards, as diffusers groups and orders their steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import tables
from fastdiff.integrations.schedulers.multistep import (
    ALGORITHMS,
    SINGLE,
    choose_order,
    choose_prediction,
    dpm_solver,
    levels_above_end,
    place,
)
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import Request, Written, angle, circle, clip, falling
from fastdiff.sampling.path import Path
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Row
from fastdiff.sampling.solvers.exponential import Form, spell, step


def singlestep(options: Options, request: Request) -> Plan:
    """Single-step DPM-Solver. The list's own levels are the stages, so a step of order 3 takes three of them."""
    kind = choose_prediction(options)
    allowed = {name: pair for name, pair in ALGORITHMS.items() if name != "sde-dpmsolver"}
    predicts, eta = options.choose("algorithm_type", allowed)
    ends_clean = options.choose("final_sigmas_type", {"zero": True, "sigma_min": False})
    if predicts == "noise" and ends_clean:
        raise options.refuse("algorithm_type", "it ends at final_sigmas_type='sigma_min' only")
    levels, told = levels_above_end(options, request)
    most = choose_order(options)
    orders = stage_orders(most, len(told), options.flag("lower_order_final"), ends_clean)
    plan = place(options, kind, Written(()), levels, told)
    single = options.choose("solver_type", SINGLE)
    rows = _rows(plan.path, plan.times, orders, predicts, single, eta)
    return plan._replace(solver=Written(rows, most - 1))


def stage_orders(most: int, steps: int, lower_final: bool, ends_clean: bool) -> list[int]:
    """The order of each evaluation: 1, 2, ... ``most``, again and again, with the last group cut to fit."""
    orders = [i % most + 1 for i in range(steps)]
    if ends_clean or (lower_final and steps % most == 0):
        orders[-1] = 1
    return orders


def _rows(
    path: Path, times: Sequence[float], orders: Sequence[int], predicts: str, single: str, eta: float
) -> tuple[Row, ...]:
    rows, start = [], 0
    for i, order in enumerate(orders):
        start = i if order == 1 else start
        now = times[i]
        last = i + 1 == len(orders) or orders[i + 1] == 1
        # of third order, "midpoint" leaves out the stage between, and takes the exact integral of the rest
        nodes = range(start, i + 1) if order < 3 or single == "exact" else (start, i)
        form = Form(predicts, "log_snr", single if order < 3 else "exact", False, -2.0 if eta else 0.0)
        names = [form.current if k == i else f"h{i - k}" for k in nodes]
        state = "x" if order == 1 else "anchor"
        weights, fresh = step(form, path, times[start], times[i + 1], [times[k] for k in nodes], names, state, eta)
        weights = spell(weights, form, path, now)
        if fresh:
            weights["n1"] = fresh
        keep = None if last else {state: 1.0}
        pushed = None if last else form.estimate(path, now)
        rows.append(Row(now, now, weights, keep, pushed, last, (i if fresh else None, None)))
    return tuple(rows)


def inverse(options: Options, request: Request) -> Plan:
    """DPM-Solver multistep upwards, from the least noisy trained step."""
    kind = choose_prediction(options)
    predicts, eta = options.choose("algorithm_type", ALGORITHMS)
    if eta:
        raise options.refuse("algorithm_type", "a step up in noise has no fresh noise to draw")
    if options.flag("use_flow_sigmas") or tables.level_kind(options):
        raise PlanError(f"{options.name} is supported over trained steps only, not over spread levels")
    products = tables.signal(options)
    table = tables.levels(products)
    noisiest = options["num_train_timesteps"] - 1 - tables.too_noisy(options, products)
    timesteps = _rising(options, request.counted(), noisiest)
    levels = np.concatenate([tables.interpolate(timesteps, table), [table[noisiest]]]).astype(np.float32)
    times = tuple(angle(float(level)) for level in levels)
    falling(options.name, [-t for t in times])
    solver = dpm_solver(options, predicts, eta, len(timesteps), ends_clean=False)
    return Plan(circle(times, timesteps.tolist()), kind, solver, times, clip=clip(options))


def _rising(options: Options, steps: int, noisiest: int) -> np.ndarray:
    kind = options.choose("timestep_spacing", {kind: kind for kind in ("linspace", "leading", "trailing")})
    if kind == "linspace":
        return np.asarray(np.linspace(0, noisiest, steps + 1).round()[:-1])
    if kind == "leading":
        places = np.arange(steps + 1) * ((noisiest + 1) // (steps + 1))
        return np.asarray(places[:-1].astype(float) + options["steps_offset"])
    return np.asarray(np.arange(noisiest + 1, 0, -options["num_train_timesteps"] / steps).round()[::-1] - 1)
