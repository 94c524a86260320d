"""Grids over noise levels: from the first to the last level that a network was trained on, then one step to the end.

Levels are the field's ``sigma`` of each path (``Path.field_sigma``): ``sigma / alpha`` for lists of betas, the time
itself on the EDM and the straight path. Grids that were derived from ``sigma / alpha`` take that on every path:
``log_snr``, ``kl_optimal`` and ``laplace``.

Without ``sigma_max`` a grid starts at ``t_start``. Without ``sigma_min`` its last but one time is ``Path.t_min``; where
the path itself ends above that noise, the levels run down to its end. These are diffusers' own limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from fastdiff.errors import PlanError
from fastdiff.sampling.grid.base import Times, falling, need_steps
from fastdiff.sampling.grid.incomplete_beta import beta_quantile
from fastdiff.sampling.path import Path
from fastdiff.sampling.path.base import ratio, ratio_time

# (highest level, lowest level, fraction of the way from the first to the last) -> level
Between = Callable[[float, float, float], float]
# Where the first level is infinite the others follow from this one, which is diffusers' for alpha^2 = 2^-24
PURE_NOISE = 4096.0


def log_snr_uniform(path: Path, n: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Times:
    """Equal steps in ``log(alpha / sigma)``.

    Args:
        path: any.
        n: steps.
        sigma_min: last level above the end.
        sigma_max: first level.

    Source: Lu et al. 2022, arXiv:2206.00927, sec. 3.4; the last step as in Karras et al. 2022.
    """
    return _by_level(path, n, sigma_min, sigma_max, _geometric, by_ratio=True)


def exponential(path: Path, n: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Times:
    """Equal ratios of noise levels. Source: k-diffusion's ``get_sigmas_exponential``; diffusers' exponential sigmas."""
    return _by_level(path, n, sigma_min, sigma_max, _geometric)


def polyexponential(
    path: Path, n: int, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 2.0
) -> Times:
    """A polynomial in the logarithm of the noise level; 1 is ``exponential``, above it levels crowd near data.

    Source: k-diffusion's ``get_sigmas_polyexponential``.
    """
    _need_positive("rho", rho)
    return _by_level(path, n, sigma_min, sigma_max, lambda high, low, u: low * (high / low) ** ((1 - u) ** rho))


def karras(
    path: Path, n: int, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 7.0
) -> Times:
    """Equal steps in ``level^(1 / rho)``. Source: Karras et al. 2022, arXiv:2206.00364, eq. 5."""
    _need_positive("rho", rho)
    return _by_level(
        path, n, sigma_min, sigma_max, lambda high, low, u: (high ** (1 / rho) * (1 - u) + low ** (1 / rho) * u) ** rho
    )


def kl_optimal(path: Path, n: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Times:
    """Equal steps in the arc tangent of the level: optimal for Gaussian data of unit variance.

    Source: Sabour et al. 2024, arXiv:2404.14507, sec. 3 (the closed form for Gaussian data).
    """

    def between(high: float, low: float, u: float) -> float:
        return math.tan((1 - u) * math.atan(high) + u * math.atan(low))

    return _by_level(path, n, sigma_min, sigma_max, between, by_ratio=True)


def laplace(
    path: Path,
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    mu: float = 0.0,
    scale: float = 0.5,
) -> Times:
    """Quantiles of a Laplace distribution of the level's logarithm: most steps near ``exp(mu)``.

    Levels beyond the limits are moved to them, so hundreds of steps coincide there and are refused.

    Args:
        path: any.
        n: steps.
        sigma_min: last level above the end.
        sigma_max: first level.
        mu: centre, as a natural logarithm.
        scale: width of the distribution.

    Source: Hang et al. 2024, arXiv:2407.03297, table 1; the limits as in ComfyUI's ``get_sigmas_laplace``.
    """
    _need_positive("scale", scale)

    def between(high: float, low: float, u: float) -> float:
        side = (u < 0.5) - (u > 0.5)
        # 1e-5 as in ComfyUI keeps the logarithm finite at both ends
        return min(max(math.exp(mu - scale * side * math.log(1 - 2 * abs(0.5 - u) + 1e-5)), low), high)

    return _by_level(path, n, sigma_min, sigma_max, between, by_ratio=True)


def beta(
    path: Path,
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    a: float = 0.6,
    b: float = 0.6,
) -> Times:
    """Quantiles of a beta distribution over noise levels: most steps near both ends, where ``a, b < 1``.

    This is diffusers' form. The paper spreads *times* that way: ``beta_time``.

    Args:
        path: any.
        n: steps.
        sigma_min: last level above the end.
        sigma_max: first level.
        a: first shape parameter, above 0.
        b: second shape parameter, above 0.

    Source: Lee et al. 2024, arXiv:2407.12173; over levels as in diffusers' ``use_beta_sigmas``.
    """
    _need_positive("a", a)
    _need_positive("b", b)
    return _by_level(
        path, n, sigma_min, sigma_max, lambda high, low, u: low + beta_quantile(1 - u, a, b) * (high - low)
    )


def beta_time(path: Path, n: int, a: float = 0.6, b: float = 0.6) -> Times:
    """Quantiles of a beta distribution over the times from ``t_start`` to ``t_min``.

    Source: Lee et al. 2024, arXiv:2407.12173, sec. 4; as in ComfyUI's ``beta`` scheduler, without its rounding.
    """
    need_steps(n)
    _need_positive("a", a)
    _need_positive("b", b)
    low = max(path.t_min, path.t_end)
    inner = [low + (path.t_start - low) * beta_quantile(1 - i / n, a, b) for i in range(1, n)]
    return falling(path, [path.t_start, *inner, path.t_end], n)


def _geometric(high: float, low: float, u: float) -> float:
    return math.exp((1 - u) * math.log(high) + u * math.log(low))


def _need_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise PlanError(f"{name} is {value!r}; allowed: above 0")


def _by_level(
    path: Path,
    n: int,
    sigma_min: float | None,
    sigma_max: float | None,
    between: Between,
    by_ratio: bool = False,
) -> Times:
    need_steps(n)
    level = partial(ratio, path) if by_ratio else path.field_sigma
    time = partial(ratio_time, path) if by_ratio else path.from_sigma
    top, bottom = level(path.t_start), level(path.t_end)
    if sigma_max is not None and not bottom < sigma_max <= top:
        raise PlanError(f"sigma_max is {sigma_max!r}; allowed: above {bottom:g}, at most {top:g} on this path")
    high = sigma_max if sigma_max is not None else top if top < math.inf else PURE_NOISE
    if sigma_min is not None and not bottom < sigma_min < high:
        raise PlanError(f"sigma_min is {sigma_min!r}; allowed: above {bottom:g} and below {high:g} on this path")
    first = path.t_start if sigma_max is None else time(high)
    if sigma_min is None and path.t_min <= path.t_end:
        inner = [time(between(high, bottom, i / n)) for i in range(1, n)]
        return falling(path, [first, *inner, path.t_end], n)
    last = path.t_min if sigma_min is None else time(sigma_min)
    low = level(path.t_min) if sigma_min is None else sigma_min
    inner = [time(between(high, low, i / (n - 1))) for i in range(1, n - 1)]
    return falling(path, [first, *inner, *([last] if n > 1 else []), path.t_end], n)
