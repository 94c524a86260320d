"""Every solver of the registry under every option that changes its numbers, found from the factories' signatures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastdiff.errors import PlanError
from fastdiff.sampling.path import RectifiedFlow
from fastdiff.sampling.solvers import SOLVERS, Row, Solver

ORDERS = ("order", "max_order", "predictor_order")
NOISE = ("eta", "tau", "churn")  # 0 means no fresh noise
SHARES = dict.fromkeys((*NOISE, "gamma"), (0.5, 1.0))
CHOICES: dict[str, tuple[Any, ...]] = {
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "predicts": ("data", "noise"),
    "predict_x0": (True, False),
    "corrector": (True, False),
    "corrector_order": (0, 1, 2, 3, 4),
    "variable": ("time", "log_snr", "ratio"),
    "lower_order_final": (True, False),
    "variance": ("fixed_small", "fixed_large"),
}
TRIAL = (0.95, 0.84, 0.71, 0.59, 0.46, 0.35, 0.23, 0.14)  # a short walk that shows what a solver does


class Variant(NamedTuple):
    """One solver with its options."""

    name: str  # of the registry
    options: dict[str, Any]
    solver: Solver

    @property
    def label(self) -> str:
        """``name(option=value, ...)``, without quotes."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def _options(name: str, noise: bool) -> Iterator[dict[str, Any]]:
    """The defaults, every order, and every other choice on its own."""
    known = inspect.signature(SOLVERS[name]).parameters
    choices = CHOICES | dict.fromkeys(ORDERS, range(1, 10)) | (SHARES if noise else {})
    yield {}
    for option in known:
        for value in choices.get(option, ()):
            if value != known[option].default:
                yield {option: value}


def variants(*, noise: bool) -> list[Variant]:
    """The solvers that add noise, or those that solve the ODE, among them noise-free forms of the former.

    Solvers that rely on a network's jumps are left out of the second kind: they have no order of their own.
    """
    found = []
    for name, factory in SOLVERS.items():
        known = inspect.signature(factory).parameters
        free = {} if noise else {option: 0.0 for option in NOISE if option in known}
        seen: list[tuple[Row, ...]] = []
        for options in _options(name, noise):
            try:
                solver = factory(**free, **options)
            except PlanError:
                continue  # not a value of this solver
            rows = solver.rows(RectifiedFlow(), TRIAL)
            if rows[0].t != TRIAL[0]:
                continue  # it walks upwards: `orders.inversion_order` is for that
            draws = any(draw is not None for row in rows for draw in row.draws)
            # a field that only declares something (the order of a solver that has one) changes no row
            if rows not in seen and draws == noise and (noise or not solver.jumps):
                found.append(Variant(name, free | options, solver))
            seen.append(rows)
    return found


def distinct(found: Sequence[Variant]) -> list[Variant]:
    """Leave out solvers that only repeat another under a second name."""
    kept: list[Variant] = []
    seen: list[tuple[Row, ...]] = []
    for variant in found:
        rows = variant.solver.rows(RectifiedFlow(), TRIAL)
        if rows not in seen:
            kept.append(variant)
            seen.append(rows)
    return kept
