"""The parts of a run from what people write: names, numbers, seeds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import PlanError, ShapeError
from fastdiff.sampling.denoiser import CallableNetwork, Cond, Denoiser, Network, NetworkDenoiser, Prepared
from fastdiff.sampling.grid import GRIDS, Grid, Times, explicit
from fastdiff.sampling.guidance import GUIDANCES, Rule
from fastdiff.sampling.inpaint import check_image, noised
from fastdiff.sampling.noise import INITIAL, GeneratorNoise, Noise, PhiloxNoise
from fastdiff.sampling.path import EDM, PATHS, DiscreteVP, Path
from fastdiff.sampling.prediction import PREDICTIONS, Prediction
from fastdiff.sampling.solvers import SOLVERS, Solver
from fastdiff.sampling.table import StepTable

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
    """Return a solver by name with its options (``eta``, ``gamma``...); options that are None are left out.

    A name may carry options of its own: ``"unipc:order=3,corrector=false"``.

    Raises:
        PlanError: naming the option and those allowed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(sampler, str):
        if given:
            raise PlanError(f"options {sorted(given)} belong to a sampler given by name; this one is {sampler!r}")
        return sampler
    name, _, spelled = sampler.partition(":")
    factory = by_name("sampler", SOLVERS, name)
    known = inspect.signature(factory).parameters
    for option in filter(None, spelled.split(",")):
        key, _, value = option.partition("=")
        given[key.strip()] = _value(value.strip())
    for key, value in given.items():
        if key not in known:
            raise PlanError(f"sampler {name!r} takes no option {key!r}; allowed: {', '.join(known) or 'none'}")
        if isinstance(value, str) and not isinstance(known[key].default, str | None):
            raise PlanError(f"{key} is {value!r}; allowed: what sampler {name!r} takes, as {known[key].default!r}")
    return factory(**given)


def _value(text: str) -> bool | float | int | str:
    """Read an option's value: true or false, a number, or a word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def make_network(network: Network | Callable[..., Tensor], prediction: Prediction) -> Network:
    """Return a function as a network, or the network given."""
    return network if hasattr(network, "prepare") else CallableNetwork(network, prediction.two_time)


def make_guidance(guidance: str | Rule) -> Rule:
    """Return a rule of guidance by name, or the rule given."""
    rule: Rule = by_name("guidance", GUIDANCES, guidance)() if isinstance(guidance, str) else guidance
    return rule


def make_times(
    path: Path,
    num_inference_steps: int,
    grid: str | Grid | None = None,
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
    chosen: Grid = grid if callable(grid) else by_name("grid", GRIDS, grid or usual)
    return chosen(path, num_inference_steps)


def initial_scale(path: Path, t: float) -> float:
    """Standard deviation of the starting noise: that of the marginal at ``t`` for data of unit variance."""
    alpha, sigma = path.alpha_sigma(t)
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


def start(
    path: Path, times: Times, shape: tuple[int, ...], latents: Tensor | None, image: Tensor | None, noise: Noise,
    device: torch.device | str, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the starting state ``[B, C, H, W]`` float32: the latents given, or the initial draw, scaled.

    With an image the state is that image noised to the first time, by the latents or by the initial draw. ``scale`` is
    that of the initial draw; the path's where None.

    Raises:
        ShapeError: if latents have another shape or hold NaN or infinity.
    """
    if latents is not None:
        check_image("latents", latents, shape)
        given = latents.to(device, torch.float32)
        return given if image is None else noised(path, image, given, times[0])
    number = torch.full((shape[0],), INITIAL, dtype=torch.int64, device=device)
    drawn = noise.draw(number, torch.empty(shape, device=device))
    if image is not None:
        return noised(path, image, drawn, times[0])
    return drawn * (initial_scale(path, times[0]) if scale is None else scale)


def plan(
    network: Network, cond: Cond, uncond: Cond | None, table: StepTable, guide: Network | None = None
) -> tuple[Denoiser, Prepared]:
    """Make the denoiser of a run and prepare its places.

    Raises:
        PlanError: if the table is guided and there is nothing to guide away from, or the other way round.
    """
    times, guided = table.times[None], any(row.guided for row in table.structure.rows)
    if guide is not None:
        if not guided:
            raise PlanError("guide is given, but no row is guided: give a guidance_scale other than 1")
        prepared = network.prepare(cond, times), guide.prepare(cond if uncond is None else uncond, times)
        return NetworkDenoiser(network, guide), prepared
    if not guided:
        return NetworkDenoiser(network), network.prepare(cond, times)
    if uncond is None:
        raise PlanError(
            "guidance_scale is not 1, so the network needs an unconditional (or negative) input: give uncond or guide"
        )
    return NetworkDenoiser(network), network.prepare(cond.joined(uncond), times)
