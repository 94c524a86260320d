"""``make check-calibrate``: measure every bar of calibration afresh, one JSON line each; exit 1 if any falls short.

``--data`` is ``fashion_mnist.npz``; without it the bars of that mixture are not measured, and do not count as met.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastdiff.benchmarks import accuracy, calibrated, quality
from fastdiff.benchmarks.bars import Bar, at_most, command, not_measured, suite
from fastdiff.benchmarks.environment import environment
from fastdiff.calibration import Calibration
from fastdiff.errors import ArtifactError
from fastdiff.pipeline import Pipeline

CALLS = (4, 5, 6, 8)
HALF, NEAR, SECONDS = 0.5, 1.15, 600.0
CURVE = 1000  # images of each point of the curves
FINALISTS = 4  # samplers of each library and number of calls that are judged on more images
Details = dict[str, Any]


def error_bars(
    case: calibrated.Case, found: Calibration, calls: Sequence[int], quick: bool, details: Details
) -> Iterator[Bar]:
    """Error of the calibrated samplers over the least of all classical ones, on noise of the problem's own."""
    problem, judge, refused = case.problem, case.judge, []
    shifts = (1.0, 1.5) if quick else accuracy.SHIFTS
    tried = accuracy.scores(problem, refused, budgets=calls, shifts=shifts, kept=2 if quick else accuracy.KEPT)
    finalists = [one for n in calls for name in accuracy.LIBRARIES for one in accuracy.best(tried, name, n, FINALISTS)]
    scores = accuracy.judged(judge, finalists, shifts)
    details[problem.name] = {
        "images": {"all samplers": len(problem.truth), "the best of them": len(judge.truth)},
        "uncertainty of the solution": judge.uncertainty,
        "samplers tried": len({(one.library, one.label) for one in tried}),
        "classical": [one._asdict() for one in scores],
        "calibrated": [],
        "peers' runs that ended in an error": refused,
    }
    yield Bar(f"{problem.name}: peers' runs that ended in an error", len(refused), "for comparison", True)
    for n in calls:
        mine = calibrated.score(judge, found, n)
        best = min((one for one in scores if one.budget == n), key=lambda one: one.error)
        details[problem.name]["calibrated"].append(mine._asdict())
        place = f"{problem.name}, {n} calls"
        yield Bar(f"{place}: least classical error", f"{best.error:.3g}: {best.library} {best.label}", "for comparison",
                  True)  # fmt: skip
        yield Bar(f"{place}: calibrated error", f"{mine.error:.3g}", "for comparison", True)
        yield at_most(f"{place}: calibrated over classical error", mine.error / best.error, HALF)


def distance(sampler: Any, calls: int, count: int) -> float:
    """Frechet distance to real digits of so many, drawn by the bundled network without guidance."""
    pipe, judge = Pipeline.from_pretrained("digits"), quality.load_classifier()
    assert isinstance(pipe, Pipeline)
    options = {"sampler": sampler, "num_inference_steps": calls, "guidance_scale": 1.0, "output_type": "pt"}
    images = torch.cat([
        pipe([k % 10 for k in range(i, i + 100)], seed=10_000 + i, **options).images for i in range(0, count, 100)
    ])  # fmt: skip
    moments = quality.moments(quality.extract(judge, images * 2 - 1))
    return quality.frechet_distance(moments, quality.reference_moments())


def frechet_bars(found: Calibration, quick: bool, details: Details) -> Iterator[Bar]:
    """Frechet distance at 5 calls over that of the same network in 50 steps; and how distance falls with calls."""
    count = 1000 if quick else 5000
    pipe = Pipeline.from_pretrained("digits")
    assert isinstance(pipe, Pipeline)
    sampler = found.sampler(*pipe.trained())
    first, last = distance(sampler, 5, count), distance("dpmpp_2m", 50, count)
    yield Bar(f"Frechet distance of {count} digits, 5 calibrated calls", round(first, 3), "for comparison", True)
    yield Bar(f"Frechet distance of {count} digits, 50 steps of dpmpp_2m", round(last, 3), "for comparison", True)
    yield at_most("Frechet distance at 5 calibrated calls over that of 50 steps", first / last, NEAR)
    curves = {
        "flow map": {n: distance("flow_map", n, CURVE) for n in (1, 2, 4)},
        "calibrated": {n: distance(sampler, n, CURVE) for n in sorted(found.fitted)},
        "dpmpp_2m": {n: distance("dpmpp_2m", n, CURVE) for n in ((5, 10) if quick else (4, 5, 6, 8, 10, 20, 50))},
    }
    details["frechet"] = {"images": count, "5 calls": first, "50 steps": last, "curve images": CURVE, "curves": curves}


def refusal_bar(found: Calibration) -> Iterator[Bar]:
    """A file of one model for another."""
    with TemporaryDirectory() as folder:
        file, said = Path(folder) / "calibration.json", "accepted"
        found.save(file)
        pipe = Pipeline.from_pretrained("digits")
        assert isinstance(pipe, Pipeline)
        replace(Calibration.load(file), model_sha256="0" * 64).save(file)
        try:
            pipe.load_calibration(file)
        except ArtifactError as error:
            said = str(error)
        pipe.load_calibration(file, force=True)
    yield Bar(
        "a calibration of another network", said, "refused, unless forced", said.startswith("this calibration is")
    )


def random_bars(count: int, details: Details) -> Iterator[Bar]:
    """Calibrated samplers of random problems, over the best classical one on fresh noise."""
    trials = [calibrated.trial(number) for number in range(count)]
    details["random problems"] = [one._asdict() for one in trials]
    ratios = sorted(one.ratio for one in trials)
    yield Bar(f"{count} random problems: median of calibrated over classical error", round(ratios[count // 2], 4),
              "for comparison", True)  # fmt: skip
    worst = max(trials, key=lambda one: one.ratio)
    yield Bar("the worst of them", f"{worst.what}, {worst.calls} calls", "for comparison", True)
    yield at_most(f"{count} random problems: largest calibrated over classical error", worst.ratio, 1.0)


def bars(quick: bool, details: Details, data: Path | None) -> Iterator[Bar]:
    """All of them."""
    details["environment"] = environment(torch.device("cpu"))
    calls = (5,) if quick else CALLS
    if data is None:
        yield not_measured("mixture fitted to Fashion-MNIST: give --data fashion_mnist.npz", f"<= {HALF:g}")
    else:
        case = calibrated.fashion(str(data))
        yield from error_bars(case, case.calibrate(calls), calls, quick, details)
    case = calibrated.digits(16, 64) if quick else calibrated.digits()
    start = time.perf_counter()
    found = case.calibrate(calls)
    seconds = time.perf_counter() - start
    details["seconds to calibrate the bundled model"] = {"steps": list(calls), "seconds": seconds}
    yield at_most(f"seconds to calibrate the bundled model for {', '.join(map(str, calls))} steps", seconds, SECONDS)
    yield from error_bars(case, found, calls, quick, details)
    yield from frechet_bars(found, quick, details)
    yield from random_bars(10 if quick else 50, details)
    yield from refusal_bar(found)
    yield suite("calibration: tests", "tests/test_calibration.py", "tests/test_non_stationary.py",
                "tests/test_embedded.py")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every bar as it is measured."""
    assert __doc__
    return command(
        "check-calibrate", __doc__, "five calls alone, fewer images and problems", bars, arguments,
        data="fashion_mnist.npz",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
