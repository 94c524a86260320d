"""Noise tables and lists of steps, in the precision and the order of operations that diffusers computes them in.

These lists are data: which whole step a float is rounded to, and the last digit of a level, decide which picture comes
out. So they are made in float32 where diffusers makes them in float32; all that follows from them is float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers.options import Options
from fastdiff.sampling.grid.incomplete_beta import beta_quantile
from fastdiff.sampling.path import cosine_betas, exp_betas, laplace_betas

Array = np.ndarray
ZERO_SNR = 2.0**-24  # what diffusers puts in place of a last alpha^2 of 0 where it divides by it
_CURVES = {"squaredcos_cap_v2": cosine_betas, "exp": exp_betas, "laplace": laplace_betas}
_SCHEDULES = ("linear", "scaled_linear", "sigmoid", *_CURVES)


def betas(options: Options, exact_roots: bool = False) -> Tensor:
    """The list of betas, ``[T]`` float32 (float64 for ``scaled_linear`` with ``exact_roots``)."""
    if options["trained_betas"] is not None:
        return torch.tensor(np.asarray(options["trained_betas"]), dtype=torch.float32)
    n = options["num_train_timesteps"]
    name = options.choose("beta_schedule", {schedule: schedule for schedule in _SCHEDULES})
    if name in _CURVES:
        return torch.tensor(_CURVES[name](n).betas, dtype=torch.float32)
    first, last = float(options["beta_start"]), float(options["beta_end"])
    if name == "linear":
        return torch.linspace(first, last, n, dtype=torch.float32)
    if name == "scaled_linear":
        dtype = torch.float64 if exact_roots else torch.float32
        return torch.linspace(first**0.5, last**0.5, n, dtype=dtype) ** 2
    return torch.sigmoid(torch.linspace(-6, 6, n)) * (last - first) + first


def signal(options: Options, divides: bool = False) -> Tensor:
    """``alpha^2`` after each trained step, ``[T]``, falling.

    Args:
        options: of a class with betas.
        divides: give zero terminal SNR the small remainder that classes need which divide by ``alpha``.
    """
    listed = betas(options)
    rescale = options.has("rescale_betas_zero_snr") and options.flag("rescale_betas_zero_snr")
    if rescale:
        moved = zero_terminal_snr(torch.cumprod(1.0 - listed, dim=0))
        listed = 1 - torch.cat([moved[:1], moved[1:] / moved[:-1]])
    products = torch.cumprod(1.0 - listed, dim=0)
    if rescale and divides:
        products[-1] = ZERO_SNR  # may lie above the last but one
        check_falling(options, products[:-1])
        return products
    return check_falling(options, products)


def zero_terminal_snr(products: Tensor) -> Tensor:
    """Move the last ``alpha^2`` to 0 and keep the first. Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1."""
    roots = products.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2


def check_falling(options: Options, products: Tensor) -> Tensor:
    """Refuse a table that does not fall strictly from below 1 to 0 or above.

    Raises:
        PlanError: two steps of equal noise cannot be told apart.
    """
    if not (products[0] < 1 and products[-1] >= 0 and bool((products[1:] < products[:-1]).all())):
        raise PlanError(f"{options.name}: the betas give noise levels that do not rise strictly in float32")
    return products


def levels(products: Tensor) -> Array:
    """``sigma / alpha`` of each trained step, ``[T]`` float32, rising."""
    return np.asarray(((1 - products) / products) ** 0.5)


def need_steps(options: Options, steps: int) -> None:
    """Raises: PlanError: if there are more steps than trained ones."""
    if steps > options["num_train_timesteps"]:
        raise PlanError(f"num_inference_steps is {steps}; {options.name} has {options['num_train_timesteps']} steps")


def spaced(options: Options, steps: int) -> Array:
    """Whole steps from noise to data, first and last included: float64 of whole numbers."""
    total, kind = options["num_train_timesteps"], _spacing(options)
    if kind == "linspace":
        return np.asarray(np.linspace(0, total - 1, steps).round()[::-1])
    if kind == "leading":
        return np.asarray((np.arange(steps) * (total // steps))[::-1].astype(float) + options["steps_offset"])
    return np.asarray(np.arange(total, 0, -total / steps).round() - 1)


def spaced_finely(options: Options, steps: int) -> Array:
    """As ``spaced``, but ``linspace`` does not round, and all is float32: the classes told fractions of steps."""
    if _spacing(options) == "linspace":
        dtype = float if options.name == "DPMSolverSDEScheduler" else np.float32
        return np.linspace(0, options["num_train_timesteps"] - 1, steps, dtype=dtype)[::-1].copy()
    return spaced(options, steps).astype(np.float32)


def spaced_above_end(options: Options, steps: int, products: Tensor) -> Array:
    """Whole steps from noise towards data, of ``steps + 1`` without the last: DPM-Solver, DEIS, UniPC, SA-Solver."""
    total = options["num_train_timesteps"]
    last = total - too_noisy(options, products)
    kind = _spacing(options) if options.has("timestep_spacing") else "linspace"
    if kind == "linspace":
        return np.asarray(np.linspace(0, last - 1, steps + 1).round()[::-1][:-1])
    if kind == "leading":
        places = np.arange(steps + 1) * (last // (steps + 1))
        return np.asarray(places[::-1][:-1].astype(float) + options["steps_offset"])
    return np.asarray(np.arange(last, 0, -total / steps).round() - 1)


def _spacing(options: Options) -> str:
    return options.choose("timestep_spacing", {kind: kind for kind in ("linspace", "leading", "trailing")})


def too_noisy(options: Options, products: Tensor) -> int:
    """How many of the noisiest steps ``lambda_min_clipped`` leaves out."""
    if not options.has("lambda_min_clipped"):
        return 0
    log_snr = torch.log(torch.sqrt(products)) - torch.log(torch.sqrt(1 - products))
    return int(torch.searchsorted(torch.flip(log_snr, [0]), options["lambda_min_clipped"]))


def interpolate(timesteps: Array, table: Array) -> Array:
    """Levels at fractions of steps, linear between the trained ones; float64.

    Raises:
        PlanError: if a step lies outside the table.
    """
    if len(timesteps) == 0 or timesteps.max() > len(table) - 1 or timesteps.min() < 0:
        raise PlanError(f"timesteps are {list(timesteps)[:4]}...; allowed: 0 to {len(table) - 1}")
    return np.asarray(np.interp(timesteps, np.arange(0, len(table)), table))


def level_kind(options: Options) -> str | None:
    """Which of the named spreads of levels the settings ask for, if any.

    Raises:
        PlanError: if they ask for two.
    """
    kinds = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
    kinds |= {"lu": "use_lu_lambdas"} if options.has("use_lu_lambdas") else {}
    chosen = [kind for kind, key in kinds.items() if options.flag(key)]
    if len(chosen) > 1:
        raise PlanError(f"{options.name} asks for {' and '.join(kinds[kind] for kind in chosen)}; allowed: one of them")
    return chosen[0] if chosen else None


def spread(kind: str, options: Options, highest: float, lowest: float, steps: int) -> Array:
    """Levels from the highest to the lowest, ``[steps]`` float64. Source: as ``fastdiff.sampling.grid``'s levels."""
    fixed = kind == "karras" and options.name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")
    if not fixed and kind != "lu":
        lowest = lowest if options.stray("sigma_min") is None else options.stray("sigma_min")
        highest = highest if options.stray("sigma_max") is None else options.stray("sigma_max")
    if not 0 < lowest <= highest:
        raise PlanError(f"{options.name}: sigma runs from {highest!r} to {lowest!r}; allowed: falling, above 0")
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        start, end = highest ** (1 / 7.0), lowest ** (1 / 7.0)
        return np.asarray((start + ramp * (end - start)) ** 7.0)
    if kind == "exponential":
        return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))
    if kind == "beta":
        return np.array([lowest + beta_quantile(place, 0.6, 0.6) * (highest - lowest) for place in 1 - ramp])
    start, end = (float(np.log(np.float32(level))) for level in (highest, lowest))
    return np.exp(start + ramp * (end - start))


def step_of(level: float | Array, log_table: Array) -> float:
    """The fraction of a trained step at which the table has this level, linear in its logarithm."""
    value = np.log(np.maximum(level, 1e-10))
    below = np.nonzero(log_table <= value)[0]  # with zero terminal SNR the table need not rise at its end
    # an integer of numpy, which makes the sum below float64 also where the level is float32
    low = np.int64(min(below[-1], len(log_table) - 2)) if len(below) else np.int64(0)
    share = np.clip((log_table[low] - value) / (log_table[low] - log_table[low + 1]), 0, 1)
    return float((1 - share) * low + share * (low + 1))
