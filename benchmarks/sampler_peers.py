"""The samplers of diffusers and k-diffusion that solve the ODE, with the options their documentation offers.

Each is driven as its users drive it, but its network is asked at exactly the noise level that the sampler itself
computes with, where the libraries round to whole timesteps; that favours them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Denoised = Callable[[Tensor, float, float], Tensor]  # (x, alpha, sigma) -> E[x0 | x]
First = Callable[[float, float], Tensor]  # (alpha, sigma) -> the state to start from at this noise level


class Run(NamedTuple):
    """What a sampler made of the starting noise, and how often it asked the network."""

    x: Tensor
    calls: int


class Peer(NamedTuple):
    """One sampler with one grid; ``run(denoised, first, budget)`` is None where the budget is too small for it."""

    library: str
    label: str
    run: Callable[[Denoised, First, int], Run | None]


# --- diffusers ------------------------------------------------------------------------------------------------------

VP_GRIDS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}
SHIFTS = (0.8, 1.0, 1.1, 1.5, 3.0)  # of the straight path, for every library
FLOW_GRIDS: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
MULTISTEP = [
    *(("DPMSolverMultistep", {"solver_order": order}) for order in (1, 2, 3)),
    ("DPMSolverMultistep", {"solver_order": 2, "solver_type": "heun"}),
    ("DPMSolverMultistep", {"solver_order": 2, "euler_at_final": True}),
    *(("DPMSolverSinglestep", {"solver_order": k, "lower_order_final": True}) for k in (2, 3)),
    *(("DEISMultistep", {"solver_order": order}) for order in (2, 3)),
    *(("UniPCMultistep", {"solver_order": order}) for order in (2, 3)),
    ("UniPCMultistep", {"solver_order": 2, "solver_type": "bh1"}),
    *(("SASolver", {"predictor_order": k, "corrector_order": k, "tau_func": lambda t: 0.0}) for k in (2, 3)),
]
VP = [
    ("DDIM", {"clip_sample": False}),
    ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("PNDM", {"skip_prk_steps": False, "set_alpha_to_one": True}),
    *MULTISTEP,
    ("DPMSolverMultistep", {"solver_order": 2, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    *((name, {}) for name in ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete")),
]
FLOW = [("FlowMatchEulerDiscrete", {}), ("FlowMatchHeunDiscrete", {}), *MULTISTEP]
UNSHOWN = ("clip_sample", "tau_func")
RATIO_STATE = ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete")  # their state is x / alpha


def diffusers_peers(kind: str, shifts: Sequence[float] = SHIFTS) -> Iterator[Peer]:
    """Diffusers' schedulers for ``kind`` ``"vp"`` (the linear betas of DDPM) or ``"flow"`` (the straight path)."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    shifted = {f"shift {shift:g}": {"shift": shift, "flow_shift": shift} for shift in shifts}
    schedulers, grids = (VP, VP_GRIDS) if kind == "vp" else (FLOW, shifted | FLOW_GRIDS)
    for name, options in schedulers:
        factory = getattr(diffusers, f"{name}Scheduler")
        known = inspect.signature(factory).parameters
        given = dict(options)
        if kind == "vp":
            given |= {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"}
        elif "use_flow_sigmas" in known:
            given |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        for grid, choice in grids.items():
            chosen = {key: value for key, value in choice.items() if key in known}
            if len(chosen) == 0 < len(choice):
                continue  # it has no such grid
            shown = ", ".join(f"{key}={value}" for key, value in options.items() if key not in UNSHOWN)
            yield Peer("diffusers", f"{name}({shown}) on {grid}", _diffusers_run(factory, given | chosen, name, kind))


def _diffusers_run(
    factory: Callable[..., Any], options: dict[str, Any], name: str, kind: str
) -> Callable[[Denoised, First, int], Run | None]:
    @torch.no_grad()
    def run(denoised: Denoised, first: First, budget: int) -> Run | None:
        for n in range(budget, 0, -1):
            scheduler = factory(**options)
            scheduler.set_timesteps(n)
            if len(scheduler.timesteps) <= budget:
                break
        else:
            return None
        x: Tensor | None = None
        for i, t in enumerate(scheduler.timesteps):
            alpha, sigma = _level(scheduler, i, t, name, kind)
            x = first(alpha, sigma) if x is None else x
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # for its bookkeeping; the network here takes the state unscaled
            noise_or_velocity = (x - (alpha if kind == "vp" else 1.0) * denoised(x, alpha, sigma)) / sigma
            x = scheduler.step(noise_or_velocity, t, x).prev_sample
        assert x is not None
        return Run(x, len(scheduler.timesteps))

    return run


def _level(scheduler: Any, i: int, t: Tensor, name: str, kind: str) -> tuple[float, float]:
    """``(alpha, sigma)`` of the state the scheduler holds before its step ``i``."""
    if name in ("DDIM", "PNDM"):
        bar = float(scheduler.alphas_cumprod[int(t)])
        return bar**0.5, (1 - bar) ** 0.5
    # KDPM2 keeps the levels of its second stages in a list of their own
    levels = scheduler.sigmas_interpol if name == "KDPM2Discrete" and i % 2 else scheduler.sigmas
    level = float(levels[i])
    if kind == "flow":
        return 1 - level, level
    return (1.0, level) if name in RATIO_STATE else (1 / (1 + level**2) ** 0.5, level / (1 + level**2) ** 0.5)


# --- k-diffusion ----------------------------------------------------------------------------------------------------


def load_k_diffusion() -> ModuleType | None:
    """Return ``k_diffusion.sampling``, or None where it is not installed.

    The package imports all that training needs (wandb, CLIP, kornia...) when it is imported; the samplers use none of
    it. So only this one module is loaded: ``pip install --no-deps k-diffusion torchsde torchdiffeq trampoline`` is
    enough. Its one use of ``k_diffusion.utils`` is ``append_dims``.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        return None
    package, utils = ModuleType("k_diffusion"), ModuleType("k_diffusion.utils")
    package.__path__ = list(spec.submodule_search_locations)
    utils.append_dims = lambda x, n: x.reshape(*x.shape, *(1,) * (n - x.ndim))  # type: ignore[attr-defined]
    held = {"k_diffusion": package, "k_diffusion.utils": utils}
    sys.modules |= held
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ImportError:
        return None
    finally:
        for name in held:
            del sys.modules[name]


def k_diffusion_peers(sigma_max: float) -> Iterator[Peer]:
    """k-diffusion's samplers on its grids, from ``sigma_max`` down; none where it is not installed."""
    module = load_k_diffusion()
    if module is None:
        return
    silent = {"noise_sampler": lambda *_: 0.0, "eta": 0.0}
    samplers: dict[str, dict[str, Any]] = {
        "euler": {}, "heun": {}, "dpm_2": {}, "lms": {}, "dpmpp_2m": {}, "dpmpp_2s_ancestral": silent,
        "dpmpp_sde": silent, "dpmpp_2m_sde": silent, "dpmpp_3m_sde": silent,
    }  # fmt: skip
    grids: dict[str, Callable[[int], Tensor]] = {}
    for low in (0.002, 0.01, 0.03):
        grids[f"karras from {low}"] = lambda n, low=low: module.get_sigmas_karras(n, low, sigma_max)
        grids[f"exponential from {low}"] = lambda n, low=low: module.get_sigmas_exponential(n, low, sigma_max)
    grids["vp"] = module.get_sigmas_vp
    for name, options in samplers.items():
        sampler = getattr(module, f"sample_{name}")
        for grid, sigmas in grids.items():
            yield Peer("k-diffusion", f"{name} on {grid}", _k_run(sampler, sigmas, options))
    for low in (0.002, 0.01, 0.03):
        yield Peer("k-diffusion", f"dpm_fast from {low}", _dpm_fast(module.sample_dpm_fast, low, sigma_max))


def _counted(denoised: Denoised) -> tuple[Callable[..., Tensor], list[float]]:
    asked: list[float] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(float(sigma[0]))
        return denoised(x, 1.0, asked[-1])

    return model, asked


def _k_run(
    sampler: Callable[..., Tensor], grid: Callable[[int], Tensor], options: dict[str, Any]
) -> Callable[[Denoised, First, int], Run | None]:
    @torch.no_grad()
    def run(denoised: Denoised, first: First, budget: int) -> Run | None:
        for n in range(budget, 0, -1):
            sigmas = grid(n)
            nothing, asked = _counted(lambda x, alpha, sigma: x)
            sampler(nothing, torch.zeros(1, 1, 1, 1), sigmas, disable=True, **options)
            if len(asked) <= budget:
                break
        else:
            return None
        model, asked = _counted(denoised)
        return Run(sampler(model, first(1.0, float(sigmas[0])), sigmas, disable=True, **options), len(asked))

    return run


def _dpm_fast(sampler: Callable[..., Tensor], low: float, high: float) -> Callable[[Denoised, First, int], Run | None]:
    @torch.no_grad()
    def run(denoised: Denoised, first: First, budget: int) -> Run | None:
        model, asked = _counted(denoised)
        return Run(sampler(model, first(1.0, high), low, high, budget, disable=True), len(asked))

    return run
