"""DPM-Solver, DEIS, UniPC and SA-Solver: schedulers that are told whole steps and may end above clean data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import tables
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import (
    Request,
    angle,
    circle,
    clip,
    falling,
    prediction,
    straight,
    unrounded,
)
from fastdiff.sampling.prediction import PREDICTIONS, Prediction
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.solvers.exponential import Form
from fastdiff.sampling.solvers.multistep import FEW_STEPS, Multistep

FINAL = {"zero": "zero", "sigma_min": "sigma_min"}
SINGLE = {"midpoint": "midpoint", "heun": "exact", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
# (what is integrated, share of the time-reversed SDE); settings of other classes are translated as diffusers does
ALGORITHMS = {
    "dpmsolver++": ("data", 0.0),
    "dpmsolver": ("noise", 0.0),
    "sde-dpmsolver++": ("data", 1.0),
    "sde-dpmsolver": ("noise", 1.0),
    "deis": ("data", 0.0),
}


def dpm(options: Options, request: Request) -> Plan:
    """DPM-Solver multistep."""
    kind = choose_prediction(options)
    predicts, eta = options.choose("algorithm_type", ALGORITHMS)
    ends_clean = options.choose("final_sigmas_type", {"zero": True, "sigma_min": False})
    if predicts == "noise" and ends_clean:
        raise options.refuse("algorithm_type", "it ends at final_sigmas_type='sigma_min' only")
    levels, told = levels_above_end(options, request, rounds=options["beta_schedule"] != "squaredcos_cap_v2")
    solver = dpm_solver(options, predicts, eta, len(told), ends_clean)
    return place(options, kind, solver, levels, told)


def dpm_solver(options: Options, predicts: str, eta: float, steps: int, ends_clean: bool) -> Multistep:
    """The solver of one run: its order falls towards the last step by diffusers' rules."""
    most, few = choose_order(options), options.flag("lower_order_final") and steps < FEW_STEPS
    if most == 3 and predicts == "noise" and eta:
        raise options.refuse("solver_order", "diffusers has no third order of 'sde-dpmsolver'")
    orders = [min(i + 1, most) for i in range(steps)]
    if few and steps > 1:
        orders[-2] = min(orders[-2], 2)
    if few or ends_clean or options.flag("euler_at_final"):
        orders[-1] = 1
    offset = -1.0 if eta and predicts == "data" else 0.0
    form = Form(predicts, "log_snr", options.choose("solver_type", SINGLE), True, offset)
    return Multistep(most, 0, form, eta, orders=tuple(orders))


def deis(options: Options, request: Request) -> Plan:
    """DEIS in ``log(sigma / alpha)``."""
    options.choose("algorithm_type", {"deis": None, "dpmsolver": None, "dpmsolver++": None})
    options.choose("solver_type", dict.fromkeys(("logrho", "midpoint", "heun", "bh1", "bh2")))
    kind = choose_prediction(options)
    levels, told = levels_above_end(options, request, repeats_last=True)
    most, steps = choose_order(options), len(told)
    few = options.flag("lower_order_final") and steps < FEW_STEPS
    orders = tuple(min(i + 1, most, steps - i if few else most) for i in range(steps))
    return place(options, kind, Multistep(most, 0, Form("noise", "log_snr"), orders=orders), levels, told)


def unipc(options: Options, request: Request) -> Plan:
    """UniPC."""
    if options["solver_p"] is not None:
        raise options.refuse("solver_p", "a scheduler inside this one; allowed: none")
    single = options.choose("solver_type", {"bh1": "bh1", "bh2": "midpoint", "midpoint": "midpoint", "heun": "midpoint",
                                            "logrho": "midpoint"})  # fmt: skip
    data = options.flag("predict_x0")
    kind = choose_prediction(options)
    levels, told = levels_above_end(options, request, repeats_last=True)
    most, steps = choose_order(options, 4), len(told)
    orders = [min(i + 1, most, steps - i if options.flag("lower_order_final") else most) for i in range(steps)]
    off = set(options["disable_corrector"] or ())
    corrections = [0] + [0 if i in off else order for i, order in enumerate(orders[:-1])]
    form = Form("data" if data else "noise", "log_snr", single)
    solver = Multistep(most, most, form, orders=tuple(orders), corrections=tuple(corrections))
    plan = place(options, kind, solver, levels, told)
    return plan if data else plan._replace(clip=None)  # diffusers thresholds the data estimate only


def sa_solver(options: Options, request: Request) -> Plan:
    """SA-Solver."""
    data = options.choose("algorithm_type", {"data_prediction": True, "noise_prediction": False})
    predictor, corrector = options["predictor_order"], options["corrector_order"]
    for key, allowed in (("predictor_order", (1, 2, 3, 4)), ("corrector_order", (2, 3, 4))):
        options.choose(key, dict.fromkeys(allowed))
    kind = choose_prediction(options)
    levels, told = levels_above_end(options, request, repeats_last=True)
    steps, lower = len(told), options.flag("lower_order_final")
    orders = [min(i + 1, predictor, steps - i if lower else predictor) for i in range(steps)]
    corrections = [0] + [min(i + 1, corrector - 1, steps - i if lower else corrector) for i in range(steps - 1)]
    form = Form("data", "log_snr", "bh1") if data else Form("noise", "log_snr")
    plan = place(options, kind, Multistep(predictor, corrector - 1, form), levels, told)
    tau = options["tau_func"]
    if tau is None:
        # the published default: stochastic in the middle of the trained steps
        tau = lambda timestep: 1.0 if 200 <= timestep <= 800 else 0.0  # noqa: E731
    if not callable(tau):
        raise options.refuse("tau_func", "allowed: none, or a function of the timestep")
    share = lambda t: float(tau(plan.path.timestep(t))) ** 2  # noqa: E731
    solver = Multistep(predictor, corrector - 1, form, share, orders=tuple(orders), corrections=tuple(corrections))
    return plan._replace(solver=solver)


def choose_order(options: Options, most: int = 3) -> int:
    """The order asked for, 1 to ``most``."""
    return options.choose("solver_order", {order: order for order in range(1, most + 1)})


def choose_prediction(options: Options) -> Prediction:
    """What the network predicts, on the path that the settings name."""
    if options.has("variance_type") and options["variance_type"] is not None:
        raise options.refuse("variance_type", "the network gives a variance in channels of its own; allowed: none")
    flow = options.flag("use_flow_sigmas")
    if options["prediction_type"] == "flow_prediction":
        if not flow:
            raise options.refuse("prediction_type", "it needs use_flow_sigmas=True, the straight path")
        return PREDICTIONS["velocity"]
    if flow and options["prediction_type"] == "v_prediction":
        raise options.refuse(
            "prediction_type", "with use_flow_sigmas diffusers reads v as if the path kept its variance"
        )
    return prediction(options, "epsilon", "sample", "v_prediction")


def levels_above_end(
    options: Options, request: Request, rounds: bool = True, repeats_last: bool = False
) -> tuple[np.ndarray, list[float]]:
    """Levels, float32, of which the last is where the run ends, and the whole steps that the network is told.

    Args:
        options: of the class.
        request: what was asked for.
        rounds: round the steps of Karras' levels; else they are cut off, like those of all other spreads.
        repeats_last: end spread levels where they end, instead of at the table's least level.
    """
    kind, flow = tables.level_kind(options), options.flag("use_flow_sigmas")
    karras_flow = flow and kind == "karras" and options.name == "UniPCMultistepScheduler"
    if flow and kind and not karras_flow:
        raise options.refuse("use_flow_sigmas", f"levels spread as {kind} are not on the straight path")
    dynamic = options.has("use_dynamic_shifting") and options.flag("use_dynamic_shifting")
    if request.mu is not None and not (dynamic and flow):
        raise PlanError(f"{options.name} takes mu with use_flow_sigmas and use_dynamic_shifting only")
    products = tables.signal(options, divides=True)
    table = tables.levels(products)
    log_table = np.log(table)
    ends = _end(options, table, repeats_last and (kind is not None or flow))
    if request.sigmas is not None and not (flow and options.name == "UniPCMultistepScheduler" and not kind):
        raise PlanError(f"{options.name} takes sigmas with use_flow_sigmas only, and in UniPC")
    if flow and not kind:
        levels = _flow_levels(options, request)
        told = levels * options["num_train_timesteps"]
    else:
        timesteps = _whole(options, request, products, kind)
        if kind is None:
            levels, told = tables.interpolate(timesteps, table), timesteps
        else:
            levels = tables.spread(kind, options, float(table[-1]), float(table[0]), request.counted())
            told = np.array([tables.step_of(level, log_table) for level in levels])
            told = told.round() if rounds and kind in ("karras", "lu") else told
        if karras_flow:
            levels = levels / (levels + 1)
            told = levels * options["num_train_timesteps"]
    end = levels[-1] if ends is None else unrounded(float(levels[-1]), ends)
    return np.concatenate([levels, [end]]).astype(np.float32), np.asarray(told).astype(np.int64).tolist()


def _end(options: Options, table: np.ndarray, repeats_last: bool) -> float | None:
    """The level a run ends at; None: where its list does."""
    if options.has("final_sigmas_type"):
        if options.choose("final_sigmas_type", FINAL) == "zero":
            return 0.0
    return None if repeats_last else float(table[0])


def _whole(options: Options, request: Request, products: Tensor, kind: str | None) -> np.ndarray:
    if request.timesteps is None:
        return tables.spaced_above_end(options, request.counted(), products)
    if kind:
        raise PlanError(f"{options.name} takes no timesteps where its settings spread the levels ({kind})")
    return np.asarray(request.timesteps, dtype=np.int64).astype(float)


def _flow_levels(options: Options, request: Request) -> np.ndarray:
    shift, total = options["flow_shift"], options["num_train_timesteps"]
    if options.name != "UniPCMultistepScheduler":
        shift = shift if request.mu is None else math.exp(request.mu)
        if request.timesteps is not None:
            raise PlanError(f"{options.name} takes no timesteps with use_flow_sigmas")
        sigmas = 1.0 - np.linspace(1, 1 / total, request.counted() + 1)
        return np.flip(shift * sigmas / (1 + (shift - 1) * sigmas))[:-1]
    if request.sigmas is not None:
        sigmas = np.asarray(request.sigmas, dtype=float)
    else:
        sigmas = np.linspace(1, 1 / total, request.counted() + 1)[:-1]
    if options.flag("use_dynamic_shifting"):
        sigmas = shifted(options, request.mu, sigmas)
    else:
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if options["shift_terminal"]:
        sigmas = stretched(sigmas, options["shift_terminal"])
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # diffusers' way around a logarithm of 0
    return sigmas


def shifted(options: Options, mu: float | None, sigmas: np.ndarray) -> np.ndarray:
    """Flow times shifted by ``mu``. Source: Esser et al. 2024, arXiv:2403.03206, sec. 5.3.2; ``mu`` as in Flux."""
    if mu is None:
        raise PlanError(f"{options.name} with use_dynamic_shifting needs mu")
    strength = options.choose("time_shift_type", {"exponential": math.exp(mu), "linear": mu})
    return strength / (strength + (1 / sigmas - 1))


def stretched(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Flow times stretched so that the last is ``terminal``."""
    rest = 1 - sigmas
    if rest[-1] == 0 or not 0 < terminal < 1:
        raise PlanError(f"shift_terminal is {terminal!r} for sigmas that end at {sigmas[-1]!r}; allowed: inside (0, 1)")
    return np.asarray(1 - rest / (rest[-1] / (1 - terminal)))


def place(options: Options, kind: Prediction, solver: Solver, levels: np.ndarray, told: Sequence[float]) -> Plan:
    """The plan of a run over levels: ``sigma / alpha``, or flow times."""
    if options.flag("use_flow_sigmas"):
        times = falling(options.name, [float(level) for level in levels])
        path = straight(times, told, options["num_train_timesteps"])
    else:
        times = falling(options.name, [angle(float(level)) for level in levels])
        path = circle(times, told)
    return Plan(path, kind, solver, times, clip=clip(options))
