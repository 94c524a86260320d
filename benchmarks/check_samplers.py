"""``make check-samplers``: measure every bar of the samplers afresh, one JSON line each; exit 1 if any falls short.

With ``--quick`` the same bars are measured on one path, fewer images and fewer rounds. ``--out`` writes the details:
errors of every size, and every sampler of every library at every budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastdiff.benchmarks import accuracy, host_cost, moments, orders
from fastdiff.benchmarks.bars import Bar, at_least, at_most, show, suite
from fastdiff.benchmarks.environment import environment, write_json
from fastdiff.benchmarks.variants import variants
from fastdiff.sampling.path import RectifiedFlow, linear_betas
from fastdiff.sampling.prediction import Velocity
from fastdiff.sampling.solvers import SOLVERS

Details = dict[str, Any]

HOST_US = 10.0  # a step
STANDARD_ERRORS = 4.5  # the largest of eight differences, over some forty samplers


def order_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """Measured order of every solver of the ODE, worst of three grids; beside it the order with its usual start."""
    yield at_most("orders: two solutions of the same ODE differ by", orders.second_opinion(), 1e-12)
    paths = {"straight": RectifiedFlow()} | ({} if quick else {"vp": linear_betas()})
    found = details.setdefault("orders", [])
    spread = 0.0
    for variant in variants(noise=False):
        spread = max(spread, orders.loop_and_walk_differ(RectifiedFlow(), Velocity(), variant.solver))
        worst, usual = float("inf"), float("inf")
        for name, path in paths.items():
            for grid in orders.BETWEEN:
                exact = orders.order_of(path, variant.solver, grid)
                worst = min(worst, exact.order)
                record = {"solver": variant.label, "declared": variant.solver.order, "path": name, "grid": grid}
                found.append(record | {"start": "exact"} | exact._asdict())
            plain = orders.order_of(path, variant.solver, "log_snr", started=False)
            usual = min(usual, plain.order)
            found.append(record | {"grid": "log_snr", "start": "usual"} | plain._asdict())
        declared = variant.solver.order
        yield at_least(f"order of {variant.label}, declared {declared}", worst, declared - orders.TOLERANCE)
        yield Bar(f"order of {variant.label} with its usual start", round(usual, 3), "for comparison", True)
    inverted = orders.inversion_order(RectifiedFlow(), SOLVERS["ddim_inversion"](), "log_snr")
    yield at_least("order of ddim_inversion, declared 1", inverted.order, 1 - orders.TOLERANCE)
    yield at_most("the loop and its rows carried out plainly differ by (float64)", spread, 1e-12)


def moment_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """Mean and variance of every solver that adds noise: their order, and the loop's samples beside them."""
    found = details.setdefault("moments", [])
    paths = {"straight": RectifiedFlow()} | ({} if quick else {"vp": linear_betas()})
    for variant in variants(noise=True):
        worst, apart = float("inf"), 0.0
        for name, path in paths.items():
            for grid in orders.BETWEEN:
                weak = moments.weak_order(path, variant.solver, grid)
                worst = min(worst, weak.order)
                found.append({"solver": variant.label, "path": name, "grid": grid} | weak._asdict())
            apart = max(apart, moments.monte_carlo(path, variant.solver))
        declared = variant.solver.order
        if declared:
            yield at_least(f"weak order of {variant.label}, declared {declared}", worst, declared - orders.TOLERANCE)
        else:  # it keeps a bias, so no order is claimed, and a bound of 0 could not fail
            yield Bar(f"weak order of {variant.label}, none declared", round(worst, 3), "for comparison", True)
        yield at_most(f"{variant.label}: samples and propagated moments, in standard errors", apart, STANDARD_ERRORS)


def accuracy_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """Error at equal network calls: our best over diffusers' best, and what is best."""
    problems = [accuracy.digits_mixture(), accuracy.digits_unet(1, 512) if quick else accuracy.digits_unet()]
    for problem in problems:
        refused: list[str] = []
        how: dict[str, Any] = {"kept": 2, "shifts": (1.0, 1.1)} if quick else {}
        found = accuracy.scores(problem, refused, **how)
        details.setdefault("accuracy", {})[problem.name] = {
            "uncertainty of the solution": problem.uncertainty,
            "samplers tried": len({(score.library, score.label) for score in found}),
            "scores": [score._asdict() for score in accuracy.shortlist(found)],
            "peers' runs that ended in an error": refused,
        }
        yield Bar(f"{problem.name}: uncertainty of the solution", problem.uncertainty, "for comparison", True)
        yield Bar(f"{problem.name}: peers' runs that ended in an error", len(refused), "for comparison", True)
        for budget in accuracy.BUDGETS:
            place = f"{problem.name}, {budget} network calls"
            tops = {name: accuracy.best(found, name, budget) for name in accuracy.LIBRARIES}
            for name, top in tops.items():
                said = f"{top[0].error:.3g}: {top[0].label}" if top else "not installed"
                yield Bar(f"{place}: least error of {name}", said, "for comparison", True)
            ratio = tops["fastdiff"][0].error / tops["diffusers"][0].error
            yield at_most(f"{place}: our least error over diffusers'", ratio, 1.0)


def host_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """What the loop costs the host at each step, beyond its arithmetic."""
    for sampler, scheduler, options in host_cost.PAIRS:
        cost = host_cost.host_cost(sampler, scheduler, options, 200 if quick else 1000)
        details.setdefault("host cost", []).append(cost._asdict())
        yield at_most(f"host cost of {sampler}, microseconds a step", cost.ours, HOST_US)
        yield Bar(f"host cost of diffusers' {scheduler}", round(cost.diffusers, 2), "for comparison", True)


def test_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """What is proven by tests: parity with diffusers, identities, mixed batches, refusals."""
    yield suite("parity with diffusers' schedulers over their settings", "tests/test_diffusers_schedulers.py",
                "tests/test_parity_diffusers.py")  # fmt: skip
    yield suite("identities between solvers, wrong options refused", "tests/test_solvers.py")
    yield suite(
        "any samplers in one batch equal each alone", "tests/test_register_machine.py", "tests/test_guidance.py"
    )
    yield suite("no host reads; inpainting, image to image, resume", "tests/test_loop.py")
    yield suite("paths, predictions and grids", "tests/test_paths.py", "tests/test_predictions.py",
                "tests/test_grids.py")  # fmt: skip


FAMILIES = {
    "tests": test_bars,
    "host": host_bars,
    "orders": order_bars,
    "moments": moment_bars,
    "accuracy": accuracy_bars,
}


def main() -> int:
    """Print every bar as it is measured."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.benchmarks.check_samplers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one path, fewer images and rounds")
    parser.add_argument("--only", choices=FAMILIES, action="append", help="measure this family of bars alone")
    parser.add_argument("--out", type=Path, help="write the details here, as JSON")
    options = parser.parse_args()
    chosen = options.only or list(FAMILIES)
    details: Details = {"environment": environment(torch.device("cpu")), "quick": options.quick}
    code = show(bar for name in chosen for bar in FAMILIES[name](options.quick, details))
    if options.out:
        write_json(options.out, details)
    return code


if __name__ == "__main__":
    sys.exit(main())
