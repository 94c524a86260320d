"""Grids that count the trained steps of a list of betas."""

from __future__ import annotations

import math

from fastdiff.errors import PlanError
from fastdiff.sampling.grid.base import Times, falling, trained_steps
from fastdiff.sampling.path import Path


def leading(path: Path, n: int, steps_offset: int = 0) -> Times:
    """Diffusers' ``timestep_spacing="leading"``: every (T // n)-th trained step, counted from the clean end.

    Args:
        path: a list of betas.
        n: steps, at most the trained ones.
        steps_offset: added to every timestep; 1 for Stable Diffusion.
    """
    total = trained_steps(path, n)
    skip = total // n
    least, most = math.floor(path.t_end), total - 1 - (n - 1) * skip
    if not least <= steps_offset <= most:
        raise PlanError(f"steps_offset is {steps_offset!r}; allowed with {n} steps on this path: {least} to {most}")
    return (*(float(k * skip + steps_offset + 1) for k in range(n - 1, -1, -1)), path.t_end)


def trailing(path: Path, n: int) -> Times:
    """Diffusers' ``timestep_spacing="trailing"``, from the noisy end.

    For some numbers of steps (61, 103, 121...) diffusers adds one more, at timestep -1; this grid does not.

    Source: Lin et al. 2023, arXiv:2305.08891, table 2.
    """
    total = trained_steps(path, n)
    # the step as numpy's arange rounds it, which decides halves
    step = (total - total / n) - total
    return falling(path, [*(float(round(total + i * step)) for i in range(n)), path.t_end], n)


def linspace(path: Path, n: int) -> Times:
    """Diffusers' ``timestep_spacing="linspace"``: from the noisiest to the least noisy trained step, both included.

    A single step starts at the noisiest one, where diffusers' DDIM starts at the least noisy.
    """
    total = trained_steps(path, n)
    if n == 1:
        return falling(path, [path.t_start, path.t_end], n)
    step = (total - 1) / (n - 1)
    return falling(path, [*(float(round(i * step) + 1) for i in range(n - 1, -1, -1)), path.t_end], n)


def quadratic(path: Path, n: int, reach: float = 0.8) -> Times:
    """Trained steps whose roots are in equal steps, dense near data.

    Args:
        path: a list of betas.
        n: steps; where two would fall on one trained step there are too many of them.
        reach: where they begin, as a share of the trained steps, as published 0.8.

    Source: Song et al. 2020, arXiv:2010.02502, app. D.2 (the quadratic choice).
    """
    total = trained_steps(path, n)
    if not 0 < reach < 1:
        raise PlanError(f"reach is {reach!r}; allowed: inside (0, 1)")
    top = math.sqrt(total * reach)
    steps = [math.floor((top * i / max(n - 1, 1)) ** 2) for i in range(n - 1, -1, -1)] if n > 1 else [top * top]
    return falling(path, [*(float(step + 1) for step in steps), path.t_end], n)


def lcm(path: Path, n: int, original_steps: int = 50) -> Times:
    """The times of latent consistency networks: ``n`` of the steps they were distilled with, from the noisy end.

    Args:
        path: a list of betas.
        n: steps, at most ``original_steps``.
        original_steps: how many steps the teacher took.

    Source: Luo et al. 2023, arXiv:2310.04378, sec. 4.3; as in diffusers' ``LCMScheduler``.
    """
    total = trained_steps(path, n)
    if not 1 <= original_steps <= total:
        raise PlanError(f"original_steps is {original_steps!r}; allowed: 1 to {total}")
    if n > original_steps:
        raise PlanError(f"num_inference_steps is {n}; the network was distilled with {original_steps}, so at most that")
    skip = total // original_steps
    chosen = [math.floor(i * (original_steps / n)) for i in range(n)]
    return falling(path, [*(float((original_steps - i) * skip) for i in chosen), path.t_end], n)
