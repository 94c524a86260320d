"""Quantiles of the beta distribution in float64, which torch does not have."""

from __future__ import annotations

import math


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function ``I_x(a, b)``, the distribution function of Beta(a, b).

    Source: DLMF 8.17.22, the continued fraction, evaluated from the front (Lentz's method).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly its mirror image converges fast
        return 1.0 - incomplete_beta(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b) - math.log(a)
    tiny = 1e-300
    numerator, denominator = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    value = denominator
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            denominator = 1 / _away(1 + term * denominator, tiny)
            numerator = _away(1 + term / numerator, tiny)
            change = denominator * numerator
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return math.exp(log_front) * value


def beta_quantile(p: float, a: float, b: float) -> float:
    """The ``x`` at which ``I_x(a, b) = p``, by Newton's method kept inside a bracket.

    Args:
        p: 0 to 1.
        a: first shape parameter, above 0.
        b: second shape parameter, above 0.
    """
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if incomplete_beta(0.5, a, b) < p:  # solve for the smaller of x and 1 - x, which keeps its digits
        return 1.0 - _smaller_quantile(1 - p, b, a)
    return _smaller_quantile(p, a, b)


def _smaller_quantile(p: float, a: float, b: float) -> float:
    """``beta_quantile`` where the answer is at most 1/2. In ``log x`` the function is all but straight near 0."""
    log_norm = _log_beta(a, b)
    low, high = -math.inf, math.log(0.5)
    u = min((math.log(p) + math.log(a) + log_norm) / a, high)  # exact as x goes to 0
    for _ in range(200):
        x = math.exp(u)
        gap = incomplete_beta(x, a, b) - p
        low, high = (low, u) if gap > 0 else (u, high)
        step = gap / math.exp(a * u + (b - 1) * math.log1p(-x) - log_norm)
        after = u - step
        if not low <= after <= high:
            after = (low + high) / 2 if low > -math.inf else high - 1.0
        if abs(after - u) <= 1e-15 * max(1.0, abs(u)):
            return math.exp(after)
        u = after
    return math.exp(u)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
