"""Diffusers' schedulers run in float32, as they are, and in float64, from the same float32 lists."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.schedulers import Plan
from fastdiff.sampling import loop
from fastdiff.sampling.denoiser import CallableNetwork, Cond, NetworkDenoiser
from fastdiff.sampling.noise import GeneratorNoise
from fastdiff.sampling.table import StepTable, build

SHAPE, SEED = (2, 3, 4, 4), 7
# classes whose networks are told something else than whole trained steps
SMALL_TIMES = ("IPNDM", "SCM", "EDM", "Cosine", "Wuerstchen", "MiniMax")


def network(name: str, variance: bool = False) -> Callable[..., Tensor]:
    """A smooth stand-in for a network that depends on the state and on what it is told.

    With ``variance`` it has a second half of channels in [-1, 1].
    """
    scale = 1.0 if any(part in name for part in SMALL_TIMES) else 1000.0

    def call(x: Tensor, timestep: Tensor, *_: Tensor) -> Tensor:
        phase = (timestep.to(x.dtype) / scale)[:, None, None, None]
        output = torch.tanh(0.7 * x + phase) * (0.3 + 0.5 * phase)
        return torch.cat([output, torch.sin(3 * x)], 1) if variance else output

    return call


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


class _Torch:
    """torch, but for what diffusers calls float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextmanager
def doubled(scheduler: Any) -> Iterator[None]:
    """Let a scheduler compute in float64, from the lists it has made and the draws it would make in float32."""
    module = sys.modules[type(scheduler).__module__]
    draw = getattr(module, "randn_tensor", None)
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            setattr(scheduler, name, value.double())
    if type(scheduler).__name__.startswith("KDPM2"):
        _stages(scheduler)
    module.torch = _Torch()
    if draw is not None:
        module.randn_tensor = lambda shape, generator=None, device=None, dtype=None, layout=None: draw(
            shape, generator=generator, device=device, dtype=torch.float32
        ).double()
    try:
        yield
    finally:
        module.torch = torch
        if draw is not None:
            module.randn_tensor = draw


def _stages(scheduler: Any) -> None:
    """The stages of DPM-Solver-2, which diffusers derives from its levels in float32, derived in float64."""
    levels = scheduler.sigmas[0::2]
    if not hasattr(scheduler, "sigmas_up"):
        middle = levels.log().lerp(levels.roll(1).log(), 0.5).exp()
    else:
        after = torch.cat([levels[1:], levels.new_zeros(1)])
        up = (after**2 * (levels**2 - after**2) / levels**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        down[-1] = 0.0
        middle = levels.log().lerp(down.log(), 0.5).exp()
        middle[-2:] = 0.0
        for name, value in (("sigmas_up", up), ("sigmas_down", down)):
            setattr(scheduler, name, torch.cat([value[:1], value[1:].repeat_interleave(2), value[-1:]]))
    told = middle[:-2] if hasattr(scheduler, "sigmas_up") else middle[1:-1]
    log_table = scheduler.log_sigmas.double().numpy()
    asked = [float(scheduler._sigma_to_t(level, log_table)) for level in told.numpy()]
    scheduler.timesteps = scheduler.timesteps.double()
    scheduler.timesteps[1::2] = torch.tensor(asked, dtype=torch.float64)
    scheduler.sigmas_interpol = torch.cat([middle[:1], middle[1:].repeat_interleave(2), middle[-1:]])


def theirs(scheduler: Any, double: bool, first: int = 0, scale: float | None = None, **step: Any) -> Tensor:
    """The end of the loop that a user of diffusers writes; the first index is announced, as its newer pipelines do.

    Args:
        scheduler: with its timesteps set.
        double: run it in float64.
        first: step to start at.
        scale: of the starting noise; the scheduler's own where None.
        step: what ``step`` takes beside.
    """
    if not double:
        return _walk(scheduler, start(), first, scale, **step)
    with doubled(scheduler):
        return _walk(scheduler, start().double(), first, scale, **step)


def _walk(scheduler: Any, x: Tensor, first: int, scale: float | None, **step: Any) -> Tensor:
    name, times = type(scheduler).__name__, list(scheduler.timesteps)[first:]
    fn = network(name, getattr(scheduler.config, "variance_type", None) == "learned_range")
    generator = torch.Generator().manual_seed(SEED)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step["generator"] = generator
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = _brownian(generator, x.dtype, name)
        step.pop("generator", None)
    if name in ("SCMScheduler", "DDPMWuerstchenScheduler"):
        times.pop()  # where the last step ends
    x = x * (getattr(scheduler, "init_noise_sigma", 1.0) if scale is None else scale)
    old = None
    for i, t in enumerate(times):
        t = t.reshape(1) if name == "DDPMWuerstchenScheduler" else t
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = fn(shown, t.reshape(1).expand(x.shape[0]))
        if name == "CogVideoXDPMScheduler":
            x, old = scheduler.step(output, old, t, times[i - 1] if i else None, x, generator=generator)
            continue
        if name == "UnCLIPScheduler":
            step["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        x = scheduler.step(output, t, x, **step).prev_sample
    return x


def _brownian(generator: torch.Generator, dtype: torch.dtype, name: str) -> Callable[[Any, Any], Tensor]:
    """A Brownian path over the levels from plain draws, in place of a tree whose draws nobody can repeat."""
    walked: list[tuple[float, Tensor]] = []

    def draw() -> Tensor:
        return torch.randn(SHAPE, generator=generator).to(dtype)

    def sampler(high: Any, low: Any) -> Tensor:
        if name.startswith("Cosine"):
            return draw()
        high, low = float(high), float(low)
        if not walked:  # to the middle of the step
            first = draw()
            walked.append((low, first * (high - low) ** 0.5))
            return first
        middle, path = walked.pop()
        return (path + draw() * (middle - low) ** 0.5) / (high - low) ** 0.5

    return sampler


@torch.no_grad()
def ours(name: str, plan: Plan, double: bool) -> tuple[Tensor, StepTable, float]:
    """The end of our loop from the same noise, the table it walked, and the largest number met on the way."""
    dtype = torch.float64 if double else torch.float32
    table = build(plan.path, plan.prediction, plan.solver, plan.times, clip=plan.clip, dtype=dtype)
    variance = any(row.learned for row in plan.solver.rows(plan.path, plan.times))
    fn = CallableNetwork(network(name, variance), plan.prediction.two_time)
    noise = GeneratorNoise(torch.Generator().manual_seed(SEED), SHAPE, table.structure.draws, initial=False)
    noise.values = noise.values.to(dtype)
    x = start().to(dtype) * plan.initial_scale
    largest = float(x.abs().max())
    for state in loop.iterate(NetworkDenoiser(fn), x, table, noise, fn.prepare(Cond(), table.times[None])):
        x = state.x
        largest = max(largest, *(float(part.abs().max()) for part in (x, *state.history)))
    return x, table, largest


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    largest = float(want.abs().max())
    return float((got - want).abs().max()) / largest if largest > 0 else float(got.abs().max())
