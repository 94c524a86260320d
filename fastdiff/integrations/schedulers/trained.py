"""Schedulers that walk over whole trained steps: DDIM, DDPM, PNDM, LCM, TCD and their kin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import tables
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import Request, Told, Written, circle, clip, prediction
from fastdiff.sampling.clipping import Clip
from fastdiff.sampling.prediction import Eps, Prediction
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Row
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.solvers.ddpm import DDPM
from fastdiff.sampling.solvers.exponential import Form, step

CLEAN = 0.0  # the angle of clean data
SMALLEST = 1e-10  # deviation of noise where diffusers needs its logarithm


@dataclass(frozen=True)
class Table:
    """The angles of all trained steps, and what stands for the step before the first."""

    angles: tuple[float, ...]
    before: float

    @classmethod
    def of(cls, options: Options, products: Tensor, clean: bool) -> Table:
        """Make it from ``alpha^2`` of each step; ``clean``: before the first step lies clean data, else that step."""
        tables.check_falling(options, products)
        angles = tuple(math.atan2(math.sqrt(1 - p), math.sqrt(p)) for p in products.double().tolist())
        return cls(angles, CLEAN if clean else angles[0])

    def at(self, k: float) -> float:
        """The angle of step ``k``; below 0 that of ``before``."""
        if k >= len(self.angles):
            raise PlanError(f"timestep {int(k)} is not trained; allowed: up to {len(self.angles) - 1}")
        return self.angles[int(k)] if k >= 0 else self.before

    def path(self, steps: Sequence[float]) -> Told:
        """The path, whose network is told the whole steps."""
        return circle([self.at(k) for k in steps], steps)


def whole(options: Options, request: Request) -> list[int]:
    """The steps asked for, or spread as the settings say, from noise to data."""
    if request.timesteps is None:
        steps = request.counted()
        tables.need_steps(options, steps)
        return [int(k) for k in tables.spaced(options, steps)]
    given = np.asarray(request.timesteps, dtype=np.int64)
    if given.ndim != 1 or len(given) == 0 or bool((np.diff(given) >= 0).any()) or given[-1] < 0:
        raise PlanError(f"timesteps are {list(request.timesteps)}; allowed: whole numbers that fall, 0 or more")
    return [int(k) for k in given]


def ddim(options: Options, request: Request) -> Plan:
    """DDIM. Each step goes ``T // n`` trained steps down, also where the next one starts elsewhere."""
    cogvideo = options.name == "CogVideoXDDIMScheduler"
    products = _cogvideo_signal(options) if cogvideo else tables.signal(options)
    table = Table.of(options, products, options.flag("set_alpha_to_one"))
    steps = whole(options, request)
    bound = None if cogvideo else clip(options, reads_clip=True)  # CogVideoX's class has a clip that it never reads
    solver = DDIM(request.eta or 0.0, keep_noise=bound is not None)
    path = table.path(steps)
    down = options["num_train_timesteps"] // request.counted()
    rows = []
    for i, k in enumerate(steps):
        row = solver.rows(path, (table.at(k), table.at(k - down)))[0]
        rows.append(row._replace(draws=(i if solver.eta else None, None)))
    kind = prediction(options, "epsilon", "sample", "v_prediction")
    times = (*(table.at(k) for k in steps), table.at(steps[-1] - down))
    return Plan(path, kind, Written(tuple(rows)), times, clip=bound)


def cogvideo_dpm(options: Options, request: Request) -> Plan:
    """SDE-DPM-Solver++(2M) as CogVideoX has it: steps of second order draw twice and use the second draw."""
    table = Table.of(options, _cogvideo_signal(options), options.flag("set_alpha_to_one"))
    steps = whole(options, request)
    path, down = table.path(steps), options["num_train_timesteps"] // request.counted()
    form, draws = Form("data", "log_snr", "midpoint"), 0
    rows = []
    for i, k in enumerate(steps):
        second = i > 0 and k - down >= 0
        known = [table.at(k), table.at(steps[i - 1])] if second else [table.at(k)]
        names = ["denoised", "h1"][: len(known)]
        weights, fresh = step(form, path, known[0], table.at(k - down), known, names, "x", 1.0)
        draws += 2 if second else 1
        rows.append(Row(known[0], known[0], weights | {"n1": fresh}, None, {"denoised": 1.0}, True, (draws - 1, None)))
    times = (*(table.at(k) for k in steps), table.at(steps[-1] - down))
    return Plan(
        path, prediction(options, "epsilon", "sample", "v_prediction"), Written(tuple(rows), 1, remembers=True), times
    )


def _cogvideo_signal(options: Options) -> Tensor:
    products = torch.cumprod(1.0 - tables.betas(options, exact_roots=True), dim=0)
    shift = options["snr_shift_scale"]
    products = products / (shift + (1 - shift) * products)
    return tables.zero_terminal_snr(products) if options.flag("rescale_betas_zero_snr") else products


def ddpm(options: Options, request: Request) -> Plan:
    """DDPM. The variance of the last step is that of the forward step with ``fixed_large``, else all but none."""
    variances = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large",
                 "learned_range": "learned_range"}  # fmt: skip
    if options["variance_type"] == "learned":
        raise options.refuse("variance_type", "diffusers takes the root of an output that may be below 0")
    if options["variance_type"] == "fixed_large_log":
        raise options.refuse("variance_type", "diffusers takes the root of its logarithm, which is below 0")
    table = Table.of(options, tables.signal(options), clean=True)
    steps = whole(options, request)
    kind = prediction(options, "epsilon", "sample", "v_prediction")
    return _ancestral(table, steps, options.choose("variance_type", variances), kind, clip(options, True))


def unclip(options: Options, request: Request) -> Plan:
    """The ancestral walk of unCLIP, over steps that its pipeline tells it one ahead."""
    variance = options.choose("variance_type", {"fixed_small_log": "fixed_small", "learned_range": "learned_range"})
    options.choose("beta_schedule", {"squaredcos_cap_v2": None})
    given = options.given | {"trained_betas": None}
    betas = tables.betas(replace(options, given=given))
    products = torch.cumprod(1.0 - betas, dim=0)
    table, count = Table.of(options, products, clean=True), request.counted()
    if count < 2:
        raise PlanError(f"num_inference_steps is {count}; allowed for {options.name}: 2 or more")
    tables.need_steps(options, count)
    steps = (np.arange(count) * ((options["num_train_timesteps"] - 1) / (count - 1))).round()[::-1].astype(int).tolist()
    bound = float(options["clip_sample_range"]) if options.flag("clip_sample") else None
    plan = _ancestral(table, steps, variance, prediction(options, "epsilon", "sample"), bound)
    # a step down by one reads its beta, which differs in float32 from what alpha^2 says: diffusers scales the image by
    # 1.0005 in the last step of the usual betas
    rows = list(plan.solver.rows(plan.path, plan.times))
    for i, (k, following) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
        if following == k - 1:
            to_x, learned = _one_down(int(k), betas, products), rows[i].learned
            if learned:
                learned = 0.5 * math.log(math.sqrt(betas[k].item()) / to_x["n1"])
            rows[i] = rows[i]._replace(to_x=to_x, learned=learned)
    return plan._replace(solver=Written(tuple(rows)))


def _one_down(k: int, betas: Tensor, products: Tensor) -> dict[str, float]:
    beta, noise = betas[k].item(), 1 - products[k].item()
    before = products[k - 1].item() if k > 0 else 1.0
    weights = {"x": math.sqrt(1 - beta) * (1 - before) / noise, "denoised": math.sqrt(before) * beta / noise}
    return weights | ({"n1": math.sqrt((1 - before) / noise * beta)} if k > 0 else {})


def _ancestral(table: Table, steps: list[int], variance: str, kind: Prediction, bound: Clip | None) -> Plan:
    path, times = table.path(steps), (*(table.at(k) for k in steps), CLEAN)
    rows = list(DDPM(variance).rows(path, times))
    if variance != "fixed_small" and steps[-1] > 0:
        last = rows[-1]
        large = path.alpha_sigma(last.t)[1]
        small = large if variance == "fixed_large" else SMALLEST
        rows[-1] = last._replace(
            to_x=dict(last.to_x) | {"n1": small}, draws=(len(rows) - 1, None), learned=0.5 * math.log(large / small)
        )
    return Plan(path, kind, Written(tuple(rows)), times, clip=bound)


def wuerstchen(options: Options, request: Request) -> Plan:
    """The ancestral walk of Wuerstchen and Stable Cascade, over fractions of time."""
    if request.timesteps is not None:
        told = torch.tensor(list(request.timesteps), dtype=torch.float32)
    else:
        told = torch.linspace(1.0, 0.0, request.counted() + 1)
    offset, scaler = torch.tensor([options["s"]], dtype=torch.float32), options["scaler"]
    warped = 1 - (1 - told) ** scaler if scaler > 1 else told**scaler if scaler < 1 else told
    start = torch.cos(offset / (1 + offset) * torch.pi * 0.5) ** 2
    products = torch.cos((warped + offset) / (1 + offset) * torch.pi * 0.5) ** 2 / start
    angles = [math.atan2(math.sqrt(1 - p), math.sqrt(p)) for p in products.clamp(0.0001, 0.9999).double().tolist()]
    for i in range(1, len(angles)):  # the least signal is cut off, so the first levels may be one and the same
        angles[i] = min(angles[i], math.nextafter(angles[i - 1], 0.0))
    if len(angles) < 2 or bool((told.diff() >= 0).any()):
        raise PlanError(f"timesteps are {told.tolist()}; allowed: two or more that fall")
    path = circle(angles, told.tolist())
    rows = list(DDPM().rows(path, angles))
    if told[-1] == 0:  # the last step lands short of clean data, yet adds no noise
        kept = {name: weight for name, weight in rows[-1].to_x.items() if name != "n1"}
        rows[-1] = rows[-1]._replace(to_x=kept, draws=(None, None))
    return Plan(path, Eps(), Written(tuple(rows)), tuple(angles))


def inverse(options: Options, request: Request) -> Plan:
    """DDIM upwards. The network is told where a step ends, and its output read as if asked where it starts."""
    if options.flag("clip_sample"):
        raise options.refuse("clip_sample", "the clean image it clips is inferred from an output of another time")
    options.choose("timestep_spacing", {"leading": None, "trailing": None})
    clean = options.flag("set_alpha_to_one")
    if options.stray("set_alpha_to_zero") is not None:
        clean = bool(options.stray("set_alpha_to_zero"))
    table = Table.of(options, tables.signal(options), clean)
    steps = whole(options, request)[::-1]
    down, name = options["num_train_timesteps"] // request.counted(), options["prediction_type"]
    kind = prediction(options, "epsilon", "sample", "v_prediction")
    path, rows = table.path(steps), []
    for k in steps:
        start, end = table.at(min(k - down, len(table.angles) - 1)), table.at(k)
        rows.append(Row(end, end, _raise(path, start, end, name)))
    return Plan(path, kind, Written(tuple(rows)), tuple(table.at(k) for k in steps))


def _raise(path: Told, start: float, end: float, name: str) -> dict[str, float]:
    """Weights of a step up from ``start``. The output F is read back from the D it stands for at ``end``."""
    (alpha, sigma), (above, noise) = path.alpha_sigma(start), path.alpha_sigma(end)
    if name == "epsilon":
        output = {"x": 1 / noise, "denoised": -above / noise}
        data, eps = (1 / alpha, -sigma / alpha), (0.0, 1.0)
    elif name == "v_prediction":
        output = {"x": above / noise, "denoised": -1 / noise}
        data, eps = (alpha, -sigma), (sigma, alpha)
    else:
        if sigma == 0:
            raise PlanError("a step up from clean data has no noise to go by where the network predicts the image")
        output = {"denoised": 1.0}
        data, eps = (0.0, 1.0), (1 / sigma, -alpha / sigma)
    of_x, of_output = (above * d + noise * e for d, e in zip(data, eps, strict=True))
    weights = {register: of_output * weight for register, weight in output.items()}
    return weights | {"x": weights.get("x", 0.0) + of_x}
