"""Exponential integrators: the one formula behind every multistep solver here.

In ``lambda = log(alpha / sigma)`` the reverse process is linear but for one term, so a step can be written exactly as
a multiple of the state plus an integral over the network's estimate. With ``h = lambda_s - lambda_t`` and
``a = 1 + eta`` (``eta = 0`` is the ODE, 1 the time-reversed SDE):

- of the data estimate D: ``x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s a int_0^h e^(-a (h - u)) D du
  + sigma_s sqrt(1 - e^(-2 eta h)) z``
- of the noise estimate: ``x_s = (alpha_s / alpha_t) x_t - sigma_s a int_0^h e^(h - u) eps du
  + sigma_s sqrt(eta (e^(2 h) - 1)) z``

The estimate is replaced by the polynomial through what is known, in a variable of the method's choice; the weights are
then moments of the kernel. Source: Lu et al. 2022, arXiv:2211.01095, sec. 4 and 5; Xue et al. 2023, arXiv:2309.05019,
sec. 4 (the SDE with any ``tau^2 = eta``); Zhang and Chen 2022, arXiv:2204.13902, sec. 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path, log_snr
from fastdiff.sampling.prediction import first_order
from fastdiff.sampling.solvers.base import log_snr_step

VARIABLES = ("log_snr", "ratio", "time")
SINGLE = ("exact", "midpoint", "bh1")
NOISE = "noise"  # stands for the current noise estimate until `spell` writes it in x and D
# 48 nodes integrate e^(-a u) times a cubic to round-off for a * h up to about 60
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(48)
GAUSS_PLACES, GAUSS_WEIGHTS = (_NODES + 1) / 2, _NODE_WEIGHTS / 2  # on [0, 1]


@dataclass(frozen=True)
class Form:
    """How the integral over the estimate is formed.

    Args:
        predicts: integrate the ``"data"`` or the ``"noise"`` estimate.
        variable: the polynomial's variable: ``"log_snr"``, ``"ratio"`` (sigma / alpha) or ``"time"``.
        single: weight of a lone difference of estimates: its ``"exact"`` integral, ``"midpoint"`` (half the kernel's
            integral, as DPM-Solver and UniPC's bh2 take it), or ``"bh1"`` (half of ``h``). All are of second order.
        halved_quadratic: halve the integral of the square, as the code of k-diffusion and diffusers does in their
            third-order multistep solver; it makes the order 2. For comparison with them only.
        square_offset: added to the integral of the square, in units of ``alpha_s``. Diffusers' stochastic third-order
            updates subtract the constant that they should add. For comparison with them only.
    """

    predicts: str = "data"
    variable: str = "log_snr"
    single: str = "exact"
    halved_quadratic: bool = False
    square_offset: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("predicts", ("data", "noise")), ("variable", VARIABLES), ("single", SINGLE)):
            if getattr(self, name) not in allowed:
                raise PlanError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")

    def estimate(self, path: Path, t: float) -> dict[str, float]:
        """The estimate made at ``t``, in registers: D, or ``(x - alpha D) / sigma``."""
        if self.predicts == "data":
            return {"denoised": 1.0}
        alpha, sigma = path.alpha_sigma(t)
        return {"x": 1 / sigma, "denoised": -alpha / sigma}

    @property
    def current(self) -> str:
        """The name of the estimate just made."""
        return "denoised" if self.predicts == "data" else NOISE


def spell(weights: dict[str, float], form: Form, path: Path, now: float) -> dict[str, float]:
    """Write the current noise estimate in the registers the table has."""
    spelled = {name: weight for name, weight in weights.items() if name != NOISE}
    if NOISE in weights:
        for name, part in form.estimate(path, now).items():
            spelled[name] = spelled.get(name, 0.0) + weights[NOISE] * part
    return spelled


def can_interpolate(form: Form, path: Path, t: float, s: float) -> bool:
    """Is the step ``t -> s`` regular enough for more than first order?"""
    if form.predicts == "noise" and form.variable == "ratio":
        return path.alpha_sigma(t)[0] > 0
    return math.isfinite(log_snr_step(path, t, s))


def can_correct(form: Form, path: Path, t: float, s: float) -> bool:
    """Can the step ``t -> s`` be done again with the estimate at its end?

    The midpoint rule for a lone difference is half the kernel's integral, which is finite from pure noise on too.
    """
    from_noise = form.predicts == "data" and form.single == "midpoint" and path.alpha_sigma(t)[0] == 0
    return (from_noise and path.alpha_sigma(s)[1] > 0) or can_interpolate(form, path, t, s)


def usable(form: Form, path: Path, times: Sequence[float], count: int) -> list[float]:
    """The newest times, up to ``count``, stopping before pure noise, where neither variable is finite."""
    kept = list(times[:1])
    for time in times[1:count]:
        if form.variable != "time" and path.alpha_sigma(time)[0] == 0:
            break
        kept.append(time)
    return kept


def step(
    form: Form,
    path: Path,
    t: float,
    s: float,
    known: Sequence[float],
    names: Sequence[str],
    state: str,
    eta: float = 0.0,
) -> tuple[dict[str, float], float]:
    """Weights of one step from ``t`` to ``s`` and the standard deviation of its fresh noise.

    Args:
        form: what is integrated, and how.
        path: the forward process.
        t: where ``state`` stands.
        s: where to go.
        known: times of the estimates; the first is at ``t``. One of them may be ``s`` (a corrector).
        names: their registers.
        state: register of the state at ``t``.
        eta: 0 walks the ODE, 1 the time-reversed SDE.
    """
    kept, total, fresh = _first_order(form, path, t, s, eta)
    weights = {state: kept, names[0]: total}
    if len(known) > 1:
        for name, weight in zip(names[1:], differences(form, path, t, s, known[1:], eta), strict=True):
            weights[name] = weights.get(name, 0.0) + weight
            weights[names[0]] -= weight
    return weights, fresh


def _first_order(form: Form, path: Path, t: float, s: float, eta: float) -> tuple[float, float, float]:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
    r, m = first_order(path, t, s)
    if form.predicts == "data":
        if eta == 0:
            return r, m, 0.0
        h = log_snr_step(path, t, s)
        kept = r * math.exp(-eta * h)
        return kept, alpha_s - kept * alpha_t, sigma_s * math.sqrt(-math.expm1(-2 * eta * h))
    if alpha_t == 0:
        raise PlanError(f"a step of the noise estimate cannot start at t={t!r}, where alpha is 0: integrate 'data'")
    kept = alpha_s / alpha_t
    walked = sigma_s - kept * sigma_t
    eta = eta if sigma_s > 0 else 0.0  # the step to clean data adds no noise
    return kept, (1 + eta) * walked, math.sqrt(max(eta * ((kept * sigma_t) ** 2 - sigma_s**2), 0.0))


def differences(
    form: Form, path: Path, t: float, s: float, others: Sequence[float], eta: float = 0.0
) -> tuple[float, ...]:
    """Weights of ``estimate(other) - estimate(t)`` that make the step exact for polynomials through all of them."""
    first, last = _variable(form, path, t), _variable(form, path, s)
    # the end is at 1 by definition, also from pure noise, where the variable is infinite
    places = np.array(
        [1.0 if other == s else (_variable(form, path, other) - first) / (last - first) for other in others]
    )
    if len(places) == 1 and form.single != "exact":
        h = log_snr_step(path, t, s)
        scale = path.alpha_sigma(s)[0] if form.predicts == "data" else -path.alpha_sigma(s)[1]
        whole = _first_order(form, path, t, s, eta)[1] if form.single == "midpoint" else scale * (1 + eta) * h
        return (float(0.5 * whole / places[0]),)
    moments = _moments(form, path, t, s, eta, len(places))
    if form.halved_quadratic and len(places) == 2:
        moments[1] *= 0.5
    if len(places) == 2:
        moments[1] += form.square_offset * path.alpha_sigma(s)[0]
    powers = np.vander(places, len(places) + 1, increasing=True)[:, 1:]
    return tuple(np.linalg.solve(powers.T, moments).tolist())


def _variable(form: Form, path: Path, t: float) -> float:
    if form.variable == "time":
        return t
    if form.variable == "log_snr":
        return log_snr(path, t)
    alpha, sigma = path.alpha_sigma(t)
    return sigma / alpha


def _moments(form: Form, path: Path, t: float, s: float, eta: float, count: int) -> np.ndarray:
    """Integrals of the kernel times ``v^k``, k = 1 to ``count``, with v running from 0 at t to 1 at s."""
    powers = np.arange(1, count + 1)
    if form.predicts == "noise" and form.variable == "ratio":  # the kernel is constant in this variable
        return _first_order(form, path, t, s, eta)[1] / (powers + 1)
    h, (alpha_s, sigma_s) = log_snr_step(path, t, s), path.alpha_sigma(s)
    if form.predicts == "data":
        a = 1 + eta
        kernel = alpha_s * a * h * np.exp(-a * h * (1 - GAUSS_PLACES))
    else:
        kernel = -sigma_s * (1 + eta) * h * np.exp(h * (1 - GAUSS_PLACES))
    if form.variable == "log_snr":
        place = GAUSS_PLACES
    elif form.variable == "ratio":
        place = np.expm1(-h * GAUSS_PLACES) / math.expm1(-h)
    else:
        start = log_snr(path, t)
        place = (np.array([path.time(start + h * z) for z in GAUSS_PLACES]) - t) / (s - t)
    return np.asarray(((GAUSS_WEIGHTS * kernel)[None] * place[None] ** powers[:, None]).sum(1))
