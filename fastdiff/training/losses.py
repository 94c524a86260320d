"""The losses of the field, in short form.

A regression loss asks for one linear combination of data and noise (``Prediction.target``). The flow-map loss distils a
network into itself: the derivative of its jump with respect to the landing time must be its own velocity at the landing
point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import Prediction

FROM_NOISE_SHARE = 0.25  # of the jumps start at pure noise, where 1-step sampling starts
HALF_WIDTH = 0.005  # of the central difference in the landing time

# network(x [B,C,H,W], timestep [B], labels [B], target timestep [B]) -> F [B,C,H,W]
TwoTimeNetwork = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Jumps(NamedTuple):
    """Intervals for the flow-map loss: from ``t`` down to ``s``, float64 ``[B]``, on the host."""

    t: Tensor
    s: Tensor


def _per_image(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(like.device, like.dtype)


def q_sample(path: Path, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw from the forward process, ``alpha(t) * x0 + sigma(t) * noise``.

    Args:
        path: any forward process.
        x0: clean images, ``[B, C, H, W]``.
        t: ``[B]`` times in the path's own unit, on the host.
        noise: standard normal, the shape of ``x0``.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4.
    """
    levels = [path.alpha_sigma(value) for value in t.tolist()]
    alpha, sigma = (_per_image([level[i] for level in levels], x0).view(-1, 1, 1, 1) for i in (0, 1))
    return alpha * x0 + sigma * noise


def timesteps(path: Path, t: Tensor, like: Tensor) -> Tensor:
    """Map times ``[B]`` to what the network is told, ``[B]`` on the device of ``like``."""
    return _per_image([path.timestep(value) for value in t.tolist()], like)


def regression_error(
    output: Tensor, path: Path, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Weighted mean squared error of a network's output against its target, ``[B]``."""
    goals = [prediction.target(path, value) for value in t.tolist()]
    data, level, weight = (_per_image([goal[i] for goal in goals], x0).view(-1, 1, 1, 1) for i in range(3))
    return (weight * (output - (data * x0 + level * noise)) ** 2).mean(dim=(1, 2, 3))


def jump_bounds(path: Path, jumps: Jumps) -> tuple[Tensor, Tensor]:
    """Landing times a little below and a little above ``s``, kept inside the path and below ``t``."""
    low = (jumps.s - HALF_WIDTH).clamp(min=path.t_end)
    return low, torch.minimum(jumps.s + HALF_WIDTH, jumps.t)


def lsd_error(
    path: Path, network: TwoTimeNetwork, x: Tensor, labels: Tensor, jumps: Jumps, below: Tensor, above: Tensor
) -> Tensor:
    """Lagrangian self-distillation error of each jump, ``[B]``.

    The jump is ``X_{t->s}(x) = x + (s - t) * F(x, t, s)``; along the landing time it must move with the velocity
    ``F(X, s, s)``, which is held fixed. The derivative is a central difference: the loss needs no forward-mode
    differentiation and its error is of second order in the half width.

    Args:
        path: a path whose velocity the network predicts on the diagonal.
        network: ``F(x, timestep, labels, target)``; called once, without gradient.
        x: ``[B, C, H, W]`` at time ``jumps.t``.
        labels: ``[B]``.
        jumps: the intervals.
        below: ``F`` at the lower landing time of ``jump_bounds``, with gradient.
        above: ``F`` at the upper one, with gradient.

    Source: Boffi, Albergo and Vanden-Eijnden 2025, arXiv:2505.18825, eq. 12 (LSD).
    """
    low, high = jump_bounds(path, jumps)

    def column(values: Tensor) -> Tensor:
        return values.to(x.device, x.dtype).view(-1, 1, 1, 1)

    landed_low = x + column(low - jumps.t) * below
    landed_high = x + column(high - jumps.t) * above
    slope = (landed_high - landed_low) / column(high - low)
    with torch.no_grad():
        middle = timesteps(path, (low + high) / 2, x)
        velocity = network((landed_low + landed_high) / 2, middle, labels, middle)
    return ((slope - velocity) ** 2).mean(dim=(1, 2, 3))


def draw_jumps(path: Path, count: int, generator: torch.Generator) -> Jumps:
    """Draw intervals: two uniform times in falling order, a share of them from pure noise."""
    pair = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    t, s = pair.max(dim=1).values, pair.min(dim=1).values
    t = torch.where(torch.rand(count, generator=generator) < FROM_NOISE_SHARE, 1.0, t.clamp(min=4 * HALF_WIDTH))
    span = path.t_start - path.t_end
    return Jumps(path.t_end + span * t, path.t_end + span * s)
