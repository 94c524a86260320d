"""Grids that were optimised for one network and published as tables of noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.errors import PlanError
from fastdiff.sampling.grid import tables
from fastdiff.sampling.grid.base import Times, falling, need_steps
from fastdiff.sampling.path import Path

SLACK = 0.01  # how far a table's first level may lie from the path's, relative


def ays_sd15(path: Path, n: int) -> Times:
    """Align Your Steps for Stable Diffusion 1.5: optimised for 10 steps, log-linear between them for others.

    Source: Sabour et al. 2024, arXiv:2404.14507, app. D.
    """
    return from_table(path, n, tables.AYS_SD15)


def ays_sdxl(path: Path, n: int) -> Times:
    """Align Your Steps for Stable Diffusion XL. Source: Sabour et al. 2024, arXiv:2404.14507, app. D."""
    return from_table(path, n, tables.AYS_SDXL)


def ays_svd(path: Path, n: int) -> Times:
    """Align Your Steps for Stable Video Diffusion, on ``EDM(sigma_max=700)``.

    Source: Sabour et al. 2024, arXiv:2404.14507, app. D.
    """
    return from_table(path, n, tables.AYS_SVD)


def gits_sd15(path: Path, n: int) -> Times:
    """Geometry-inspired times for Stable Diffusion 1.5: one table each for 2 to 20 steps, log-linear above.

    Source: Chen et al. 2024, arXiv:2405.11326, coefficient 1.20 of the authors' tables.
    """
    need_steps(n)
    inner = tables.GITS_BETWEEN[min(n, 20) - 2] if n > 1 else ()
    return from_table(path, n, (tables.GITS_FIRST, *inner, tables.GITS_LAST))


def oss_flux(path: Path, n: int) -> Times:
    """Optimal step sizes for Flux (straight path), made for 10 steps. Source: Pei et al. 2025, arXiv:2503.21774."""
    return from_table(path, n, tables.OSS_FLUX)


def oss_wan(path: Path, n: int) -> Times:
    """Optimal step sizes for Wan (straight path), made for 20 steps. Source: Pei et al. 2025, arXiv:2503.21774."""
    return from_table(path, n, tables.OSS_WAN)


def from_table(path: Path, n: int, levels: Sequence[float]) -> Times:
    """Walk published noise levels; for another number of steps, those log-linear between them.

    The last level stands for the clean end: the last step goes from the one before it to ``t_end``.

    Args:
        path: one that starts at the table's first level, to 1%.
        n: steps.
        levels: falling, above 0, in the field's ``sigma`` of the path.
    """
    need_steps(n)
    top = path.field_sigma(path.t_start)
    if abs(levels[0] / top - 1) > SLACK:
        raise PlanError(
            f"this table was made for networks whose noise starts at {levels[0]:g}; allowed: a path that does, and "
            f"this one starts at {top:g}"
        )
    last = len(levels) - 1
    times = [path.from_sigma(_log_linear(levels, i * last / n)) for i in range(n)]
    if times[0] > path.t_start or math.isclose(times[0], path.t_start, rel_tol=1e-4):
        times[0] = path.t_start  # the figures are rounded
    return falling(path, [*times, path.t_end], n)


def _log_linear(levels: Sequence[float], place: float) -> float:
    k = min(int(place), len(levels) - 2)
    if place == k:
        return levels[k]
    part = place - k
    return math.exp((1 - part) * math.log(levels[k]) + part * math.log(levels[k + 1]))
