"""Paths whose levels are plain functions of time: the straight path, EDM's and TrigFlow's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.sampling.path.base import check_time, noise_ratio, ratio, ratio_time


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path ``x_t = (1 - t) * x0 + t * z``, t from 1 to 0.

    A time shift (Stable Diffusion 3, Flux) moves the times at which the network is asked, never this path: it is a
    grid, ``fastdiff.sampling.grid.shifted``.

    Source: Liu et al. 2022, arXiv:2209.03003, eq. 1; Lipman et al. 2022, arXiv:2210.02747, with t reversed.
    """

    t_start: float = 1.0
    t_end: float = 0.0
    t_min: float = 0.001  # the least of the 1000 trained times of diffusers

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        return 1.0 - t, float(t)

    def rate(self, t: float) -> tuple[float, float]:
        return -1.0, 1.0

    def time(self, log_snr: float) -> float:
        small = math.exp(-abs(log_snr))
        return (small if log_snr > 0 else 1.0) / (1.0 + small)

    def timestep(self, t: float) -> float:
        return 1000.0 * t

    def from_timestep(self, timestep: float) -> float:
        return timestep / 1000.0

    def field_sigma(self, t: float) -> float:
        return t

    def from_sigma(self, sigma: float) -> float:
        return sigma

    def train_time(self, u: float) -> float:
        return 1.0 - u  # in (0, 1]: the pure-noise end is a time people sample from, the clean end is not


@dataclass(frozen=True)
class EDM:
    """The variance-exploding path of EDM: ``x_t = x0 + t * z``.

    Consistency networks that were trained down to ``sigma_min`` only want ``t_end = sigma_min``.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1 (sigma(t) = t, s(t) = 1).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_end: float = 0.0

    @property
    def t_start(self) -> float:
        return self.sigma_max

    @property
    def t_min(self) -> float:
        return self.sigma_min

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        return 1.0, float(t)

    def rate(self, t: float) -> tuple[float, float]:
        return 0.0, 1.0

    def time(self, log_snr: float) -> float:
        return noise_ratio(log_snr)

    def timestep(self, t: float) -> float:
        return 0.25 * math.log(t) if t > 0 else -math.inf

    def from_timestep(self, timestep: float) -> float:
        return math.exp(4.0 * timestep)

    def field_sigma(self, t: float) -> float:
        return t

    def from_sigma(self, sigma: float) -> float:
        return sigma

    def train_time(self, u: float) -> float:
        return math.exp(math.log(self.sigma_min) * (1 - u) + math.log(self.sigma_max) * u)


@dataclass(frozen=True)
class TrigFlow:
    """The circular path ``x_t = cos(t) * x0 + sin(t) * sigma_data * z``, t from pi / 2 to 0.

    The paper draws its noise with the standard deviation of the data; here ``z`` is standard normal, so that factor
    belongs to sigma. At every time ``x_t`` then has the standard deviation ``sigma_data`` of data that have it.
    ``sigma_data * tan(t)`` is EDM's noise level: that is the ``sigma`` of ``from_sigma``.

    Source: Lu and Song 2024, arXiv:2410.11081, sec. 3.1.
    """

    sigma_data: float = 0.5
    t_start: float = math.pi / 2
    t_end: float = 0.0

    @property
    def t_min(self) -> float:
        return math.atan(0.002 / self.sigma_data)  # EDM's least noise level

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        check_time(self, t)
        # sin(pi / 2 - t), since cos of the float nearest to pi / 2 is 6e-17 and not the pure noise it stands for
        return math.sin(math.pi / 2 - t), self.sigma_data * math.sin(t)

    def rate(self, t: float) -> tuple[float, float]:
        return -math.sin(t), self.sigma_data * math.sin(math.pi / 2 - t)

    def time(self, log_snr: float) -> float:
        return math.atan(noise_ratio(log_snr) / self.sigma_data)

    def timestep(self, t: float) -> float:
        return t

    def from_timestep(self, timestep: float) -> float:
        return timestep

    def field_sigma(self, t: float) -> float:
        return ratio(self, t)

    def from_sigma(self, sigma: float) -> float:
        return ratio_time(self, sigma)

    def train_time(self, u: float) -> float:
        return self.t_start * (1.0 - u)
