"""Where to put the steps: functions ``(path, n) -> n + 1`` falling times, on the host in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fastdiff.errors import PlanError
from fastdiff.sampling.path import DiscreteVP, Path, log_snr

Times = tuple[float, ...]
MAX_STEPS = 10_000  # the tables of more would not fit anywhere useful
Grid = Callable[[Path, int], Times]


def _need_steps(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_STEPS:
        raise PlanError(f"num_inference_steps is {n!r}; allowed: a whole number from 1 to {MAX_STEPS}")


def uniform(path: Path, n: int) -> Times:
    """Equal steps in ``t`` from ``t_start`` to ``t_end``."""
    _need_steps(n)
    span = path.t_end - path.t_start
    return tuple(path.t_start + span * (i / n) for i in range(n)) + (path.t_end,)


def log_snr_uniform(path: Path, n: int, sigma_min: float = 0.002) -> Times:
    """Equal steps in ``log(alpha / sigma)`` down to ``sigma_min``, then one step to ``t_end``.

    Source: Lu et al. 2022, arXiv:2206.00927, sec. 3.4; the last step as in Karras et al. 2022.
    """
    return _by_ratio(
        path, n, sigma_min, lambda first, last, u: math.exp((1 - u) * math.log(first) + u * math.log(last))
    )


def karras(path: Path, n: int, sigma_min: float = 0.002, rho: float = 7.0) -> Times:
    """Equal steps in ``(sigma / alpha)^(1 / rho)`` down to ``sigma_min``, then one step to ``t_end``.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """
    if rho <= 0:
        raise PlanError(f"rho is {rho!r}; allowed: above 0")
    return _by_ratio(
        path,
        n,
        sigma_min,
        lambda first, last, u: ((1 - u) * first ** (1 / rho) + u * last ** (1 / rho)) ** rho,
    )


def _by_ratio(path: Path, n: int, sigma_min: float, between: Callable[[float, float, float], float]) -> Times:
    _need_steps(n)
    first = math.exp(min(-log_snr(path, path.t_start), math.log(1000.0)))  # alpha(t_start) may be 0: ratio infinite
    if not 0 < sigma_min < first:
        raise PlanError(f"sigma_min is {sigma_min!r}; allowed: above 0 and below {first:g} on this path")
    inner = [path.time(-math.log(between(first, sigma_min, i / max(n - 1, 1)))) for i in range(1, n)]
    return (path.t_start, *inner, path.t_end)


def leading(path: Path, n: int, offset: int = 0) -> Times:
    """Diffusers' ``timestep_spacing="leading"``: every (T // n)-th trained step, counted from the clean end."""
    total = _trained_steps(path, n)
    return tuple(float(k * (total // n) + offset + 1) for k in range(n - 1, -1, -1)) + (path.t_end,)


def trailing(path: Path, n: int) -> Times:
    """Diffusers' ``timestep_spacing="trailing"``, from the noisy end. Source: Lin et al. 2023, arXiv:2305.08891."""
    total = _trained_steps(path, n)
    return tuple(float(round(total - i * total / n)) for i in range(n)) + (path.t_end,)


def linspace(path: Path, n: int) -> Times:
    """Diffusers' ``timestep_spacing="linspace"``: from the noisiest to the least noisy trained step, both included."""
    total = _trained_steps(path, n)
    last = max(n - 1, 1)
    return tuple(float(round((total - 1) * (last - i) / last) + 1) for i in range(n)) + (path.t_end,)


def _trained_steps(path: Path, n: int) -> int:
    _need_steps(n)
    if not isinstance(path, DiscreteVP):
        raise PlanError(
            f"this grid counts trained steps, which a {type(path).__name__} path does not have: use 'uniform'"
        )
    total = len(path.betas)
    if n > total:
        raise PlanError(f"num_inference_steps is {n}; this path has {total} trained steps, so at most {total}")
    return total


def explicit(path: Path, times: Sequence[float]) -> Times:
    """Check times given by the user; ``t_end`` is added where they stop above it.

    Raises:
        PlanError: if they do not fall strictly, are not finite, or leave the path.
    """
    values = tuple(float(t) for t in times)
    if not values or not all(math.isfinite(t) for t in values):
        raise PlanError(f"times are {list(values)}; allowed: one or more finite numbers")
    if values[-1] > path.t_end:
        values += (path.t_end,)
    if any(a <= b for a, b in zip(values, values[1:], strict=False)):
        raise PlanError(f"times are {list(values)}; they must fall strictly")
    if values[0] > path.t_start or values[-1] < path.t_end:
        raise PlanError(f"times run from {values[0]} to {values[-1]}; allowed: {path.t_start} to {path.t_end}")
    return values


GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "log_snr": log_snr_uniform,
    "karras": karras,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}
