"""What a solver is: a pure function from times to rows of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import first_order

# Weights over named registers; what is not named weighs 0.
#   x          what the network saw                 denoised   D after guidance and clipping
#   anchor     the state at the start of the step   raw        D before clipping
#   h1, h2...  history, newest first                n1, n2     two draws of standard normal noise
Weights = Mapping[str, float]


class Row(NamedTuple):
    """One network evaluation of one image, and what becomes of its registers. All numbers are float64."""

    t: float  # where the network is evaluated
    s: float  # target handed to a two-time network; s = t asks it for its velocity
    to_x: Weights  # what the network sees next
    to_anchor: Weights | None = None  # None: the anchor becomes the new x
    to_history: Weights | None = None  # None: nothing is pushed
    ends: bool = True  # a step of the solver ends here (previews, counters)
    draws: tuple[int | None, int | None] = (None, None)  # which draws n1 and n2 are; stages may share one
    learned: float = 0.0  # n1 is multiplied by e^(learned (1 + v)), v in [-1, 1] from the network's second half


class Solver(Protocol):
    """A frozen dataclass that holds options, never state."""

    @property
    def order(self) -> int:
        """Proven order on smooth problems (for noise-free options, and for multistep methods once started)."""

    @property
    def history(self) -> int:
        """How many history registers it needs."""

    @property
    def jumps(self) -> bool:
        """Does it rely on estimates that belong to one interval (flow maps, consistency networks)?"""

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        """Return the rows of a walk over ``times``, which fall strictly."""


def ddim_weights(path: Path, t: float, s: float, eta: float = 0.0) -> dict[str, float]:
    """Weights of one DDIM step from ``t`` down to ``s``: ``x_s = x * x_t + denoised * D + n1 * z``.

    The step keeps part of the noise that is already in the state and adds fresh noise for the rest.

    Args:
        path: maps time to ``(alpha, sigma)``.
        t: current time; ``sigma(t) > 0``.
        s: next time, below ``t``.
        eta: share of fresh noise, 0 (deterministic) to 1 (ancestral).

    Source: Song et al. 2020, arXiv:2010.02502, eq. 12 and 16, restated for any alpha and sigma.
    """
    r, m = first_order(path, t, s)
    if eta == 0:
        return {"x": r, "denoised": m}
    alpha_t, sigma_t = path.alpha_sigma(t)
    alpha_s, sigma_s = path.alpha_sigma(s)
    fresh = eta * ancestral_noise(path, t, s)
    kept = math.sqrt(max(sigma_s * sigma_s - fresh * fresh, 0.0)) / sigma_t
    return {"x": kept, "denoised": alpha_s - kept * alpha_t, "n1": fresh}


def renoised_weights(path: Path, t: float, landing: float, s: float) -> dict[str, float]:
    """Weights of a first-order step from ``t`` down to ``landing``, whose result is noised again up to ``s``.

    Args:
        path: maps time to ``(alpha, sigma)``.
        t: current time.
        landing: below ``s``.
        s: next time.
    """
    (alpha_l, sigma_l), (alpha_s, sigma_s) = path.alpha_sigma(landing), path.alpha_sigma(s)
    back = alpha_s / alpha_l
    weights = {name: back * value for name, value in ddim_weights(path, t, landing).items()}
    return weights | {"n1": math.sqrt(max(sigma_s**2 - (back * sigma_l) ** 2, 0.0))}


def ancestral_noise(path: Path, t: float, s: float) -> float:
    """Standard deviation of ``q(x_s | x_t, x0)``. Source: Ho et al. 2020, arXiv:2006.11239, eq. 7."""
    alpha_t, sigma_t = path.alpha_sigma(t)
    alpha_s, sigma_s = path.alpha_sigma(s)
    return sigma_s / sigma_t * math.sqrt(max(sigma_t * sigma_t - (alpha_t / alpha_s * sigma_s) ** 2, 0.0))


def log_snr_step(path: Path, t: float, s: float) -> float:
    """``h = lambda_s - lambda_t``, infinite where either end is pure noise or clean data."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
    if alpha_t == 0 or sigma_s == 0:
        return math.inf
    return math.log(alpha_s / alpha_t) + math.log(sigma_t / sigma_s)
