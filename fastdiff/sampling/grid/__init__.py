"""Where to put the steps: functions ``(path, n) -> n + 1`` falling times, on the host in float64.

Options beyond the two are keywords with the usual values as defaults; ``functools.partial`` sets them.
"""

from __future__ import annotations

from fastdiff.sampling.grid.base import MAX_STEPS, Grid, Times, explicit, uniform
from fastdiff.sampling.grid.levels import (
    beta,
    beta_time,
    exponential,
    karras,
    kl_optimal,
    laplace,
    log_snr_uniform,
    polyexponential,
)
from fastdiff.sampling.grid.published import (
    ays_sd15,
    ays_sdxl,
    ays_svd,
    from_table,
    gits_sd15,
    oss_flux,
    oss_wan,
)
from fastdiff.sampling.grid.straight import dynamic_shift, linear_quadratic, perflow, shift_time, shifted
from fastdiff.sampling.grid.trained import lcm, leading, linspace, quadratic, trailing

GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "log_snr": log_snr_uniform,
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "kl_optimal": kl_optimal,
    "laplace": laplace,
    "beta": beta,
    "beta_time": beta_time,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
    "lcm": lcm,
    "shifted": shifted,
    "linear_quadratic": linear_quadratic,
    "perflow": perflow,
    "ays_sd15": ays_sd15,
    "ays_sdxl": ays_sdxl,
    "ays_svd": ays_svd,
    "gits_sd15": gits_sd15,
    "oss_flux": oss_flux,
    "oss_wan": oss_wan,
}

__all__ = [
    "GRIDS",
    "MAX_STEPS",
    "Grid",
    "Times",
    "ays_sd15",
    "ays_sdxl",
    "ays_svd",
    "beta",
    "beta_time",
    "dynamic_shift",
    "explicit",
    "exponential",
    "from_table",
    "gits_sd15",
    "karras",
    "kl_optimal",
    "laplace",
    "lcm",
    "leading",
    "linear_quadratic",
    "linspace",
    "log_snr_uniform",
    "oss_flux",
    "oss_wan",
    "perflow",
    "polyexponential",
    "quadratic",
    "shift_time",
    "shifted",
    "trailing",
    "uniform",
]
