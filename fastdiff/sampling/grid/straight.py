"""Grids of the straight path: time shifts, and the linear-quadratic grid."""

from __future__ import annotations

import math

from fastdiff.errors import PlanError
from fastdiff.sampling.grid.base import Times, falling, need_steps
from fastdiff.sampling.path import Path, RectifiedFlow


def shift_time(t: float, shift: float) -> float:
    """Move a time of the straight path towards noise: ``s t / (1 + (s - 1) t)``.

    It multiplies ``sigma / alpha`` by ``shift`` and keeps both ends.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """
    return shift * t / (1 + (shift - 1) * t)


def dynamic_shift(
    length: int,
    *,
    base_length: int = 256,
    max_length: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    linear: bool = False,
) -> float:
    """Return the shift for an image by its number of tokens: ``exp(mu)``, or ``mu`` itself.

    ``mu`` is the line through ``(base_length, base_shift)`` and ``(max_length, max_shift)``, and goes on beyond them.
    Diffusers' exponential ``time_shift`` by ``mu`` is ``shift_time`` by ``exp(mu)``, its linear one by ``mu``.

    Args:
        length: tokens of the latent image; 2x2 latent pixels are one token in Flux and Stable Diffusion 3.
        base_length: tokens at which ``mu`` is ``base_shift``.
        max_length: tokens at which ``mu`` is ``max_shift``.
        base_shift: see above.
        max_shift: see above.
        linear: diffusers' ``time_shift_type="linear"``.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 5.3.2; the line as in diffusers' ``calculate_shift``.
    """
    if length < 1 or base_length == max_length:
        raise PlanError(f"length is {length!r} between {base_length} and {max_length}; allowed: 1 or more, two lengths")
    mu = base_shift + (max_shift - base_shift) * (length - base_length) / (max_length - base_length)
    if linear and mu <= 0:
        raise PlanError(f"mu is {mu!r} at length {length}; allowed: above 0 for a linear shift")
    return mu if linear else math.exp(mu)


def shifted(path: Path, n: int, shift: float = 3.0, t_last: float | None = None, t_first: float = 1.0) -> Times:
    """Equal steps on the straight path, moved towards noise by ``shift_time``.

    Args:
        path: the straight path.
        n: steps.
        shift: 1 moves nothing; 3 is Stable Diffusion 3's. ``dynamic_shift`` computes Flux's.
        t_last: the last time above 0, before the shift; 1 / n of the first by default, as Flux does it. Diffusers'
            Euler scheduler with a static shift, left alone, takes ``shift_time(1 / 1000, shift)``.
        t_first: the first time, before the shift. At 1, pure noise, the log-SNR is infinite, so that a multistep solver
            learns nothing from its first step; just below, say at 0.999, it does.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """
    _need_straight(path, n)
    if not 0.5 <= t_first <= 1:
        raise PlanError(f"t_first is {t_first!r}; allowed: 0.5 to 1")
    last = t_first / n if t_last is None else t_last
    if not 0 < shift < math.inf:
        raise PlanError(f"shift is {shift!r}; allowed: above 0")
    if not 0 < last < t_first and n > 1:
        raise PlanError(f"t_last is {last!r}; allowed: above 0, below {t_first:g}")
    times = [shift_time(t_first - (t_first - last) * i / max(n - 1, 1), shift) for i in range(n)]
    return falling(path, [*times, path.t_end], n)


def linear_quadratic(path: Path, n: int, threshold: float = 0.025, linear_steps: int | None = None) -> Times:
    """Short equal steps near noise down to ``1 - threshold``, then steps that grow linearly.

    Args:
        path: the straight path.
        n: steps.
        threshold: how far the equal steps reach.
        linear_steps: how many they are; half of all by default.

    Source: Polyak et al. 2024, Movie Gen, arXiv:2410.13720, sec. 3.4.2; the join is smooth as in Genmo's Mochi.
    """
    _need_straight(path, n)
    if n == 1:
        return path.t_start, path.t_end
    count = n // 2 if linear_steps is None else linear_steps
    if not 1 <= count < n or not 0 < threshold <= count / n:
        raise PlanError(
            f"threshold is {threshold!r} with {count!r} of {n} steps linear; allowed: 1 to {n - 1} linear steps and a "
            f"threshold above 0, at most their share of the steps"
        )
    slope, rest = threshold / count, n - count
    bend = (1 - threshold - slope * rest) / rest**2
    gone = [slope * i for i in range(count)] + [threshold + slope * j + bend * j * j for j in range(rest)]
    return falling(path, [*(1 - value for value in gone), path.t_end], n)


def perflow(path: Path, n: int, windows: int = 4) -> Times:
    """Equal steps inside each of the equal windows of a PeRFlow network, in whole thousandths.

    Where ``n`` is no multiple of ``windows`` the first windows have one step more.

    Args:
        path: the straight path.
        n: steps, at least one for each window.
        windows: as many as the network was trained with.

    Source: Yan et al. 2024, arXiv:2405.07510; the times are those of the authors' scheduler.
    """
    _need_straight(path, n)
    if windows < 1:
        raise PlanError(f"windows is {windows!r}; allowed: 1 or more")
    if n < windows:
        raise PlanError(f"num_inference_steps is {n}; allowed: {windows} or more, a step for each window")
    counts = [n // windows + (i < n % windows) for i in range(windows)]
    times = [1 - (i + j / count) / windows for i, count in enumerate(counts) for j in range(count)]
    return falling(path, [*(math.floor(1000 * t + 1e-6) / 1000 for t in times), path.t_end], n)


def _need_straight(path: Path, n: int) -> None:
    need_steps(n)
    if not isinstance(path, RectifiedFlow) or (path.t_start, path.t_end) != (1.0, 0.0):
        raise PlanError(f"this grid is made for the straight path from 1 to 0; got {path!r}: use 'uniform' or 'karras'")
