"""``fastdiff.sample``: the samplers for people with their own network, in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import PlanError, ShapeError
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.sampling.denoiser import CallableNetwork, Cond, Denoiser, Network, NetworkDenoiser, Prepared
from fastdiff.sampling.grid import GRIDS, Times, explicit
from fastdiff.sampling.guidance import ClassifierFree
from fastdiff.sampling.loop import State, iterate
from fastdiff.sampling.noise import INITIAL, GeneratorNoise, Noise, PhiloxNoise
from fastdiff.sampling.path import EDM, PATHS, DiscreteVP, Path
from fastdiff.sampling.prediction import PREDICTIONS, Prediction
from fastdiff.sampling.solvers import SOLVERS, Solver
from fastdiff.sampling.table import StepTable, Strength, build

Generators = torch.Generator | Sequence[torch.Generator]


def by_name(kind: str, table: dict[str, Any], name: str) -> Any:
    """Look a name up.

    Raises:
        PlanError: listing the allowed names.
    """
    if name not in table:
        raise PlanError(f"unknown {kind} {name!r}; allowed: {', '.join(sorted(table))}")
    return table[name]


def make_path(path: str | Path) -> Path:
    """Return a path by name, or the path given."""
    return by_name("path", PATHS, path)() if isinstance(path, str) else path


def make_prediction(prediction: str | Prediction) -> Prediction:
    """Return a prediction by name, or the prediction given."""
    return by_name("prediction", PREDICTIONS, prediction) if isinstance(prediction, str) else prediction


def make_solver(sampler: str | Solver, options: dict[str, Any]) -> Solver:
    """Return a solver by name with its options (``eta``, ``gamma``...); options that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(sampler, str):
        if given:
            raise PlanError(f"options {sorted(given)} belong to a sampler given by name; this one is {sampler!r}")
        return sampler
    factory = by_name("sampler", SOLVERS, sampler)
    known = [name for name in inspect.signature(factory).parameters if name not in ("history", "jumps")]
    for name in given:
        if name not in known:
            raise PlanError(f"sampler {sampler!r} takes no option {name!r}; allowed: {', '.join(known)}")
    return factory(**given)


def make_times(
    path: Path,
    num_inference_steps: int,
    grid: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Times:
    """Return the times of a run: from explicit ``timesteps`` or ``sigmas`` (the field's units), else from a grid.

    Without a name the grid is the path's usual one: trained steps counted from the noisy end for lists of betas,
    Karras for EDM, equal steps otherwise.
    """
    if sum(option is not None for option in (grid, timesteps, sigmas)) > 1:
        raise PlanError("give one of grid, timesteps and sigmas, not several")
    if timesteps is not None:
        return explicit(path, [path.from_timestep(float(value)) for value in timesteps])
    if sigmas is not None:
        return explicit(path, [path.from_sigma(float(value)) for value in sigmas])
    usual = "trailing" if isinstance(path, DiscreteVP) else "karras" if isinstance(path, EDM) else "uniform"
    return by_name("grid", GRIDS, grid or usual)(path, num_inference_steps)


def initial_scale(path: Path) -> float:
    """Standard deviation of the starting noise: that of the marginal at ``t_start`` for data of unit variance."""
    alpha, sigma = path.alpha_sigma(path.t_start)
    return float((alpha * alpha + sigma * sigma) ** 0.5)


def make_noise(
    shape: tuple[int, ...],
    draws: int,
    seed: int | Sequence[int] | None,
    generator: Generators | None,
    device: torch.device | str,
    initial: bool,
) -> Noise:
    """Return the noise source of a run: counter-based from seeds, or from generators in diffusers' order.

    One seed for a batch gives image ``i`` the seed ``seed + i``; without one, torch's own generator draws it.
    """
    if generator is not None:
        if seed is not None:
            raise PlanError("give seed or generator, not both")
        return GeneratorNoise(generator, shape, draws, device, initial)
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(shape[0])]
    if len(seeds) != shape[0]:
        raise ShapeError(f"{len(seeds)} seeds for a batch of {shape[0]}; allowed: one, or one for each image")
    bad = next((s for s in seeds if not isinstance(s, int) or not 0 <= s < 2**63), None)
    if bad is not None:
        raise PlanError(f"seed is {bad!r}; allowed: whole numbers from 0 to 2^63 - 1")
    return PhiloxNoise(torch.tensor(seeds, dtype=torch.int64, device=device))


def start(path: Path, shape: tuple[int, ...], latents: Tensor | None, noise: Noise, device: Any) -> Tensor:
    """Return the starting state ``[B, C, H, W]`` float32: the latents given, or the initial draw, scaled.

    Raises:
        ShapeError: if latents have another shape or hold NaN or infinity.
    """
    if latents is None:
        empty = torch.empty(shape, device=device)
        number = torch.full((shape[0],), INITIAL, dtype=torch.int64, device=device)
        return noise.draw(number, empty) * initial_scale(path)
    if tuple(latents.shape) != shape:
        raise ShapeError(f"latents are {tuple(latents.shape)}; needed: {shape}")
    if not bool(torch.isfinite(latents).all()):
        raise ShapeError("latents hold NaN or infinity; allowed are finite numbers")
    return latents.to(device, torch.float32)


def plan(network: Network, cond: Cond, uncond: Cond | None, table: StepTable) -> tuple[Denoiser, Prepared]:
    """Choose the denoiser of a run and prepare its places.

    Raises:
        PlanError: if the table is guided and there is nothing to guide away from.
    """
    if not any(row.guided for row in table.structure.rows):
        return NetworkDenoiser(network), network.prepare(cond, table.times[None])
    if uncond is None:
        raise PlanError("guidance_scale is not 1, so the network needs an unconditional input: give uncond")
    return ClassifierFree(network), network.prepare(cond.joined(uncond), table.times[None])


@torch.no_grad()
def sample(
    network: Network | Callable[..., Tensor],
    shape: Sequence[int],
    *,
    num_inference_steps: int = 20,
    sampler: str | Solver = "dpmpp_2m",
    path: str | Path = "straight",
    prediction: str | Prediction = "velocity",
    cond: Cond | None = None,
    uncond: Cond | None = None,
    guidance_scale: Strength = 1.0,
    grid: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    gamma: float | None = None,
    clip: float | None = None,
    seed: int | Sequence[int] | None = None,
    generator: Generators | None = None,
    latents: Tensor | None = None,
    device: torch.device | str = "cpu",
    callback: Callable[[int, float, State], None] | None = None,
    ops: Ops = REFERENCE,
) -> Tensor:
    """Sample from any network.

    Args:
        network: ``fn(x, timestep)`` for one-time networks, ``fn(x, timestep, target)`` for two-time ones, each with the
            conditioning as keywords; or a ``Network``.
        shape: ``(B, C, H, W)``.
        num_inference_steps: steps of the grid.
        sampler: a name of ``SOLVERS`` or a solver.
        path: a name of ``PATHS`` or a path: what the network was trained on.
        prediction: a name of ``PREDICTIONS`` or a prediction: what it outputs.
        cond: conditioning of the batch.
        uncond: the same for "nothing asked for"; needed for guidance.
        guidance_scale: strength of classifier-free guidance, a number or a function of time; 1 means none.
        grid: a name of ``GRIDS``.
        timesteps: explicit times, in the network's units.
        sigmas: explicit times, as noise levels.
        eta: share of fresh noise of ``ddim`` and ``dpmpp_sde``.
        gamma: share of fresh noise of ``flow_map``.
        clip: bound of the denoised estimate.
        seed: one for the batch, or one for each image.
        generator: torch generators instead of seeds, drawn in diffusers' order.
        latents: the starting state instead of noise, ``[B, C, H, W]``.
        device: where to run.
        callback: gets the row's number, the time the network was told at it, and the state after it.
        ops: kernels.

    Returns:
        ``[B, C, H, W]`` float32.

    Raises:
        PlanError: if the parts do not fit one another.
        ShapeError: if latents or seeds do not fit the batch.
    """
    size = tuple(int(n) for n in shape)
    if len(size) != 4 or min(size) < 1:
        raise ShapeError(f"shape is {size}; allowed: (B, C, H, W), each 1 or more")
    walked, kind = make_path(path), make_prediction(prediction)
    solver = make_solver(sampler, {"eta": eta, "gamma": gamma})
    times = make_times(walked, num_inference_steps, grid, timesteps, sigmas)
    table = build(walked, kind, solver, times, guidance=guidance_scale, clip=clip, device=device)
    ready = network if hasattr(network, "prepare") else CallableNetwork(network, kind.two_time)
    denoiser, prepared = plan(ready, cond or Cond(), uncond, table)
    noise = make_noise(size, table.structure.draws, seed, generator, device, initial=latents is None)
    x = start(walked, size, latents, noise, device)
    told = table.times[:, 0].tolist() if callback is not None else []
    for i, state in enumerate(iterate(denoiser, x, table, noise, prepared, ops)):
        x = state.x
        if callback is not None:
            callback(i, told[i], state)
    return x
