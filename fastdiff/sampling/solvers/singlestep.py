"""Single-step DPM-Solvers: two or three evaluations a step, nothing remembered between steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path, log_snr
from fastdiff.sampling.solvers.base import Row, ancestral_noise, ddim_weights, log_snr_step
from fastdiff.sampling.solvers.dpmpp import solver_form
from fastdiff.sampling.solvers.exponential import Form, spell, step

STAGES = {2: (0.5,), 3: (1 / 3, 2 / 3)}  # in log-SNR, of the whole step; the values of both papers


@dataclass(frozen=True)
class SingleStep:
    """DPM-Solver-2 and -3 (noise estimate), DPM-Solver++(2S) and (3S) (data estimate).

    Steps that touch pure noise or clean data have one stage.

    Source: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2; Lu et al. 2022, arXiv:2211.01095, algorithm 1.

    Args:
        order: stages of a step, 2 or 3.
        form: what is integrated, and how.
        eta: share of fresh noise: each step lands lower and noise brings it back (ancestral, as k-diffusion).
        grouped: the grid's own times are the stages, ``order`` of them a step, so that the number of steps asked for
            is the number of network calls (as diffusers does). Of order 3 only with ``every_estimate``.
        every_estimate: the last stage's polynomial runs through all estimates of the step, not the first and the last.
        lower_order_final: grouped: let the last group be shorter (otherwise only where the steps do not divide).
    """

    order: int = 2
    form: Form = field(default_factory=lambda: solver_form("data", "midpoint"))
    eta: float = 0.0
    grouped: bool = False
    every_estimate: bool = False
    lower_order_final: bool = False
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.order not in STAGES:
            raise PlanError(f"order is {self.order!r}; allowed: 2, 3")
        if not 0 <= self.eta <= 1:
            raise PlanError(f"eta is {self.eta!r}; allowed: 0 to 1")

    @property
    def history(self) -> int:
        return self.order - 1

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows: list[Row] = []
        for number, group in enumerate(self._groups(path, times)):
            down = group[-1] if self.eta == 0 else _landing(path, group[0], group[-1], self.eta)
            rows += self._step(path, group, down, number)
        return tuple(rows)

    def _groups(self, path: Path, times: Sequence[float]) -> list[tuple[float, ...]]:
        """The stages of each step and, last, where it ends."""
        if self.grouped:
            return self._grouped(path, times)
        groups = []
        for t, s in zip(times, times[1:], strict=False):
            down = s if self.eta == 0 else _landing(path, t, s, self.eta)
            h = log_snr_step(path, t, down)
            shares = STAGES[self.order] if math.isfinite(h) else ()
            groups.append((t, *(path.time(log_snr(path, t) + share * h) for share in shares), s))
        return groups

    def _grouped(self, path: Path, times: Sequence[float]) -> list[tuple[float, ...]]:
        steps, sizes = len(times) - 1, []
        left = steps
        if self.lower_order_final and steps >= self.order and steps % self.order == 0:
            left -= self.order  # the last full group becomes a shorter one and a single step
        sizes = [self.order] * (left // self.order)
        rest = steps - sum(sizes)
        sizes += [self.order - 1, 1] if rest == self.order and rest > 1 else [rest] if rest else []
        groups, start = [], 0
        for size in sizes:
            group = tuple(times[start : start + size + 1])
            if math.isfinite(log_snr_step(path, group[0], group[-1])):
                groups.append(group)
            else:
                groups += [tuple(pair) for pair in zip(group, group[1:], strict=False)]
            start += size
        return groups

    def _step(self, path: Path, group: Sequence[float], down: float, number: int) -> list[Row]:
        rows = []
        start, stages = group[0], len(group) - 1
        for j, t in enumerate(group[:-1]):
            last = j == stages - 1
            goal = down if last else group[j + 1]
            if j == 0:
                weights: dict[str, float] = dict(ddim_weights(path, t, goal))
            else:
                nodes = range(j + 1) if self.every_estimate else (0, j)
                names = [self.form.current if k == j else f"h{j - k}" for k in nodes]
                weights, _ = step(self.form, path, start, goal, [group[k] for k in nodes], names, "anchor")
                weights = spell(weights, self.form, path, t)
            fresh = ancestral_noise(path, start, group[-1]) * self.eta if last else 0.0
            if fresh:
                back = path.alpha_sigma(group[-1])[0] / path.alpha_sigma(down)[0]
                weights = {name: back * value for name, value in weights.items()} | {"n1": fresh}
            keep = None if last else {"x": 1.0} if j == 0 else {"anchor": 1.0}
            pushed = None if last else self.form.estimate(path, t)
            rows.append(Row(t, t, weights, keep, pushed, last, (number if fresh else None, None)))
        return rows


def _landing(path: Path, t: float, s: float, eta: float) -> float:
    """Where ``sigma / alpha`` is so much below that of ``s`` that the step's fresh noise brings it back."""
    alpha, sigma = path.alpha_sigma(s)
    fresh = eta * ancestral_noise(path, t, s)
    return path.time(math.log(alpha) - 0.5 * math.log(sigma**2 - fresh**2)) if sigma > fresh else path.t_end


def dpmpp_2s(eta: float = 0.0) -> SingleStep:
    """DPM-Solver++(2S); with ``eta`` its ancestral form. Source: Lu et al. 2022, arXiv:2211.01095, algorithm 1."""
    return SingleStep(2, solver_form("data", "midpoint"), eta)


def dpmpp_3s() -> SingleStep:
    """DPM-Solver++ with three stages. Source: Lu et al. 2022, arXiv:2211.01095, sec. 4.1 with arXiv:2206.00927's."""
    return SingleStep(3, solver_form("data", "heun"))


def dpm_2s(eta: float = 0.0) -> SingleStep:
    """DPM-Solver-2, k-diffusion's ``dpm_2``; with ``eta`` its ancestral form. Source: arXiv:2206.00927, algorithm 1."""
    return SingleStep(2, solver_form("noise", "midpoint"), eta)


def dpm_3s() -> SingleStep:
    """DPM-Solver-3. Source: Lu et al. 2022, arXiv:2206.00927, algorithm 2."""
    return SingleStep(3, solver_form("noise", "heun"))
