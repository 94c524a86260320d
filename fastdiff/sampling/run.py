"""``fastdiff.sample``: the samplers for people with their own network, in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastdiff.errors import PlanError, ShapeError
from fastdiff.kernels import REFERENCE, Ops
from fastdiff.sampling import loop
from fastdiff.sampling.clipping import Clip
from fastdiff.sampling.denoiser import Cond, Denoiser, Network, Prepared
from fastdiff.sampling.grid import Grid, Times
from fastdiff.sampling.guidance import Rule
from fastdiff.sampling.inpaint import Inpaint, Known, check_image, shorten
from fastdiff.sampling.loop import State
from fastdiff.sampling.noise import Noise
from fastdiff.sampling.parts import (
    Generators,
    initial_scale,
    make_guidance,
    make_network,
    make_noise,
    make_path,
    make_prediction,
    make_solver,
    make_times,
    plan,
    start,
)
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import Prediction
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.steering import Interval, Strength
from fastdiff.sampling.step_cache import planned
from fastdiff.sampling.table import StepTable, build

Walk = Callable[[Denoiser, Tensor, StepTable, Noise, Prepared, Ops], Tensor]  # ``loop.sample``, or in its place


class Step(NamedTuple):
    """One network evaluation of a run."""

    index: int  # the row's number
    timestep: float  # what the network was told at it
    state: State  # after it


class Plan(NamedTuple):
    """How to walk: what ``fastdiff.sampling.table.build`` takes, and what the run starts from.

    ``initial_scale`` is the standard deviation of the starting noise. States are those of ``path``: where diffusers
    walks in ``x / alpha`` (its ``scale_model_input``), ours are ``alpha`` times theirs.
    """

    path: Path
    prediction: Prediction
    solver: Solver
    times: Times
    initial_scale: float = 1.0
    clip: Clip | None = None


@runtime_checkable
class Planner(Protocol):
    """A sampler that brings all parts of a run: a diffusers scheduler, or a calibration."""

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
    ) -> Plan:
        """Plan one run."""


def sample(
    network: Network | Callable[..., Tensor],
    shape: Sequence[int],
    *,
    num_inference_steps: int = 20,
    sampler: str | Solver | Planner = "dpmpp_2m",
    path: str | Path = "straight",
    prediction: str | Prediction = "velocity",
    cond: Cond | None = None,
    uncond: Cond | None = None,
    guidance_scale: Strength | Sequence[Strength] = 1.0,
    guidance: str | Rule = "cfg",
    guidance_rescale: float = 0.0,
    guidance_interval: Interval | None = None,
    guide: Network | Callable[..., Tensor] | None = None,
    grid: str | Grid | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    gamma: float | None = None,
    clip: Clip | None = None,
    seed: int | Sequence[int] | None = None,
    generator: Generators | None = None,
    latents: Tensor | None = None,
    image: Tensor | None = None,
    strength: float = 1.0,
    mask_image: Tensor | None = None,
    keep: str = "estimate",
    resume: tuple[int, State] | None = None,
    cache_interval: int = 1,
    cache_branch_id: int = 0,
    device: torch.device | str = "cpu",
    callback: Callable[[int, float, State], None] | None = None,
    ops: Ops = REFERENCE,
    walk: Walk = loop.sample,
) -> Tensor:
    """Sample from any network.

    Args:
        network: ``fn(x, timestep)`` for one-time networks, ``fn(x, timestep, target)`` for two-time ones, each with the
            conditioning as keywords; or a ``Network``.
        shape: ``(B, C, H, W)``.
        num_inference_steps: steps of the grid.
        sampler: a name of ``SOLVERS``, a solver, or what ``fastdiff.from_diffusers_scheduler`` returns, which brings
            path, prediction, grid and clip with it.
        path: a name of ``PATHS`` or a path: what the network was trained on.
        prediction: a name of ``PREDICTIONS`` or a prediction: what it outputs.
        cond: conditioning of the batch.
        uncond: what to guide away from: "nothing asked for", or a negative conditioning. It holds the same parts as
            ``cond``.
        guidance_scale: strength of guidance, a number or a function of time, or one of these for each image; 1 means
            none.
        guidance: a name of ``GUIDANCES`` or a rule: how the two estimates are mixed.
        guidance_rescale: share of the guided output that is brought back to the conditional one's contrast, 0 to 1.
        guidance_interval: noise levels ``sigma / alpha`` between which to guide; outside them the network runs once.
        guide: a weaker network of the same path and prediction, asked in place of ``uncond`` (autoguidance). It is told
            ``uncond`` if that is given, else ``cond``.
        grid: a name of ``GRIDS``, or a function of path and steps.
        timesteps: explicit times, in the network's units.
        sigmas: explicit times, as noise levels.
        eta: share of fresh noise of ``ddim`` and ``dpmpp_sde``.
        gamma: share of fresh noise of ``flow_map``.
        clip: bound of the denoised estimate, or a ``DynamicThreshold``.
        seed: one for the batch, or one for each image.
        generator: torch generators instead of seeds, drawn in diffusers' order.
        latents: the starting state instead of noise, ``[B, C, H, W]``; beside ``image`` the noise to add to it.
        image: clean images ``[B, C, H, W]`` to start from, noised to the first time (image to image).
        strength: share of the steps to walk from ``image``, above 0 and up to 1.
        mask_image: ``[B, 1, H, W]`` in [0, 1]: where to paint (1) and where to keep ``image`` (0).
        keep: how: ``"estimate"``, the image is the network's estimate there; ``"noise"``, it is shown to the network
            noised by the draw that the walk starts from, as diffusers does; with a strength of 1 that walk starts from
            the draw alone.
        resume: rows already walked and the state after them, as ``callback`` got them (its number plus 1); all other
            arguments as they were.
        cache_interval: step caching, which is lossy: run the whole network at every so many evaluations, and at the
            others only the layers above a skip connection, with the deep features kept; 1 means never.
        cache_branch_id: that skip connection; 0, the shallowest, leaves out most.
        device: where to run.
        callback: gets the row's number, the time the network was told at it, and the state after it.
        ops: kernels.
        walk: what runs the loop where nobody wants to see its steps, such as a captured one.

    Returns:
        ``[B, C, H, W]`` float32.

    Raises:
        PlanError: if the parts do not fit one another.
        ShapeError: if images, latents, seeds, conditioning or strengths do not fit the batch.
    """
    given = {name: value for name, value in locals().items() if name not in ("callback", "ops", "walk")}
    ready = _ready(**given)
    x = ready.state.x
    if callback is None and resume is None and ready.kept is None:
        with torch.no_grad():
            return walk(ready.denoiser, x, ready.table, ready.noise, ready.prepared, ops)
    for step in _walk(ready, ops):
        x = step.state.x
        if callback is not None:
            callback(*step)
    return x


def iterate(network: Network | Callable[..., Tensor], shape: Sequence[int], **options: Any) -> Iterator[Step]:
    """Sample from any network, one network evaluation at a time: for previews, and to stop early.

    Args:
        network: as of ``sample``.
        shape: ``(B, C, H, W)``.
        options: all that ``sample`` takes, but for ``callback`` and ``walk``.

    Returns:
        The row's number, the time the network was told at it, and the state after it, which ``resume`` goes on from.

    Raises:
        PlanError: if the parts do not fit one another; at once, not at the first step.
        ShapeError: if images, latents, seeds, conditioning or strengths do not fit the batch.
    """
    ops = options.pop("ops", REFERENCE)
    return _walk(ready(network, shape, **options), ops)


def ready(
    network: Network | Callable[..., Tensor], shape: Sequence[int], *, history: int | None = None, **options: Any
) -> Ready:
    """All parts of a run before its first network evaluation, for those who walk by themselves.

    Args:
        network: as of ``sample``.
        shape: ``(B, C, H, W)``.
        history: registers to provide, at least what the solver needs; images of one batch share one number.
        options: all that ``sample`` takes, but for ``callback``, ``ops`` and ``walk``.

    Raises:
        PlanError: if the parts do not fit one another.
        ShapeError: if images, latents, seeds, conditioning or strengths do not fit the batch.
    """
    bound = inspect.signature(sample).bind(network, shape, **options)
    bound.apply_defaults()
    given = bound.arguments
    del given["walk"], given["ops"]
    if isinstance(given["num_inference_steps"], str):
        raise PlanError(
            f"num_inference_steps is {given['num_inference_steps']!r}; a run that its caller walks takes a number, or "
            "'auto' with sampler 'calibrated'"
        )
    if given.pop("callback") is not None:
        raise PlanError("a run that its caller walks takes no callback: the caller gets every state")
    return _ready(**given, history=history)


class Ready(NamedTuple):
    """A run before its next network evaluation."""

    denoiser: Denoiser
    state: State
    table: StepTable
    noise: Noise
    prepared: Prepared
    first: int
    kept: Inpaint | None = None  # puts the picture itself back at the end, where the walk ends above clean data


@torch.no_grad()
def _walk(ready: Ready, ops: Ops) -> Iterator[Step]:
    told = ready.table.times[:, 0].tolist()
    walk = loop.iterate(
        ready.denoiser, ready.state.x, ready.table, ready.noise, ready.prepared, ops, ready.first, ready.state
    )
    for i, state in enumerate(walk, start=ready.first):
        if ready.kept is not None and i + 1 == len(told):
            state = state._replace(x=ready.kept.restored(state.x))
        yield Step(i, told[i], state)


@torch.no_grad()
def _ready(
    *,
    network: Network | Callable[..., Tensor],
    shape: Sequence[int],
    num_inference_steps: int,
    sampler: str | Solver | Planner,
    path: str | Path,
    prediction: str | Prediction,
    cond: Cond | None,
    uncond: Cond | None,
    guidance_scale: Strength | Sequence[Strength],
    guidance: str | Rule,
    guidance_rescale: float,
    guidance_interval: Interval | None,
    guide: Network | Callable[..., Tensor] | None,
    grid: str | Grid | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    eta: float | None,
    gamma: float | None,
    clip: Clip | None,
    seed: int | Sequence[int] | None,
    generator: Generators | None,
    latents: Tensor | None,
    image: Tensor | None,
    strength: float,
    mask_image: Tensor | None,
    keep: str,
    resume: tuple[int, State] | None,
    cache_interval: int,
    cache_branch_id: int,
    device: torch.device | str,
    history: int | None = None,
) -> Ready:
    """Make all parts of a run; for ``history`` see ``ready``."""
    size = tuple(int(n) for n in shape)
    if len(size) != 4 or min(size) < 1:
        raise ShapeError(f"shape is {size}; allowed: (B, C, H, W), each 1 or more")
    cond = cond or Cond()
    for name, part in (("cond", cond), ("uncond", uncond)):
        if part is not None:
            part.check(name, size[0])
    if isinstance(guidance_scale, Sequence) and not isinstance(guidance_scale, str) and len(guidance_scale) != size[0]:
        raise ShapeError(f"guidance_scale has {len(guidance_scale)} strengths for a batch of {size[0]}")
    scale = None
    if isinstance(sampler, Planner):
        given = {"path": path != "straight", "prediction": prediction != "velocity", "grid": grid, "gamma": gamma,
                 "clip": clip}  # fmt: skip
        if any(given.values()):
            raise PlanError(f"the sampler brings its own {', '.join(name for name, value in given.items() if value)}")
        steps = num_inference_steps if timesteps is None and sigmas is None else None
        walked, kind, solver, times, scale, clip = sampler.plan(steps, timesteps=timesteps, sigmas=sigmas, eta=eta)
    else:
        walked, kind = make_path(path), make_prediction(prediction)
        solver = make_solver(sampler, {"eta": eta, "gamma": gamma})
        times = make_times(walked, num_inference_steps, grid, timesteps, sigmas)
    if keep not in ("estimate", "noise"):
        raise PlanError(f"keep is {keep!r}; allowed: 'estimate', 'noise'")
    if image is None and (mask_image is not None or strength != 1):
        raise PlanError("strength and mask_image need an image to start from: give image")
    if mask_image is not None:
        check_image("mask_image", mask_image, (size[0], 1, *size[2:]))
    if image is not None:
        check_image("image", image, size)
        image, times = image.to(device, torch.float32), shorten(times, strength)
    table = build(
        walked, kind, solver, times, guidance=guidance_scale, rule=make_guidance(guidance), rescale=guidance_rescale,
        interval=guidance_interval, clip=clip, history=history, device=device,
    )  # fmt: skip
    ready = make_network(network, kind)
    if (cache_interval, cache_branch_id) != (1, 0):
        if guide is not None:
            raise PlanError("cache_interval and guide do not go together: a guide is asked whole at every row")
        table = planned(table, ready, cache_interval, cache_branch_id)
    denoiser, prepared = plan(ready, cond, uncond, table, None if guide is None else make_network(guide, kind))
    noise = make_noise(size, table.structure.draws, seed, generator, device, initial=latents is None)
    from_noise = keep == "noise" and mask_image is not None and strength == 1
    kept = None
    if image is not None and mask_image is not None:
        mask, known = mask_image.to(device, torch.float32), None
        if keep == "noise":
            drawn = start(walked, times, size, latents, None, noise, device, 1.0)
            known = Known.of(walked, [row.t for row in solver.rows(walked, times)], drawn, from_noise)
        denoiser = Inpaint(denoiser, image, mask, known)
        kept = denoiser if keep == "noise" else None
    if resume is not None:
        return Ready(denoiser, resume[1], table, noise, prepared, resume[0], kept)
    if from_noise:
        x = drawn * (initial_scale(walked, times[0]) if scale is None else scale)
    else:
        x = start(walked, times, size, latents, image, noise, device, scale)
    state = State.start(x, table.structure.history, table.structure.momentum)
    return Ready(denoiser, state, table, noise, prepared, 0, kept)
