"""Forward processes: how data turns into noise, ``x_t = alpha(t) * x0 + sigma(t) * z``.

Everything here is host arithmetic in float64. ``t`` falls from ``t_start`` (noise) to ``t_end`` (data) when sampling.
A path is defined by the square-root signal and noise levels; the SDE and the ODE that share these marginals follow
from ``alpha, sigma`` and their time derivatives alone (Song et al. 2020, arXiv:2011.13456, sec. 3 and 4).
"""

from __future__ import annotations

from collections.abc import Callable

from fastdiff.sampling.path.base import Path, log_snr
from fastdiff.sampling.path.betas import (
    DiscreteVP,
    cosine_betas,
    exp_betas,
    laplace_betas,
    linear_betas,
    quadratic_betas,
    sigmoid_betas,
    zero_terminal_snr,
)
from fastdiff.sampling.path.flow import EDM, RectifiedFlow, TrigFlow
from fastdiff.sampling.path.sde import VE, VPSDE, OrnsteinUhlenbeck, SubVPSDE

PATHS: dict[str, Callable[[], Path]] = {
    "straight": RectifiedFlow,
    "linear": linear_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
    "cosine": cosine_betas,
    "exp": exp_betas,
    "laplace": laplace_betas,
    # diffusers' names
    "scaled_linear": quadratic_betas,
    "squaredcos_cap_v2": cosine_betas,
    "linear_zero_snr": lambda: zero_terminal_snr(linear_betas()),
    "quadratic_zero_snr": lambda: zero_terminal_snr(quadratic_betas()),
    "cosine_zero_snr": lambda: zero_terminal_snr(cosine_betas()),
    "ornstein_uhlenbeck": OrnsteinUhlenbeck,
    "vp_sde": VPSDE,
    "sub_vp": SubVPSDE,
    "ve": VE,
    "edm": EDM,
    "trigflow": TrigFlow,
}

__all__ = [
    "EDM",
    "PATHS",
    "VE",
    "VPSDE",
    "DiscreteVP",
    "OrnsteinUhlenbeck",
    "Path",
    "RectifiedFlow",
    "SubVPSDE",
    "TrigFlow",
    "cosine_betas",
    "exp_betas",
    "laplace_betas",
    "linear_betas",
    "log_snr",
    "quadratic_betas",
    "sigmoid_betas",
    "zero_terminal_snr",
]
