"""One line of a check: what was measured, the bound, and whether it holds."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.benchmarks.environment import write_json

ROOT = Path(__file__).resolve().parents[1]


class Bar(NamedTuple):
    """One line of the result."""

    bar: str
    value: Any
    bound: str
    ok: bool


def _number(value: float) -> float | str:
    """Six digits; infinity as a word, since JSON has no number for it."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def at_most(name: str, value: float, bound: float) -> Bar:
    """A bar that is met from below."""
    return Bar(name, _number(value), f"<= {bound:g}", value <= bound)


def at_least(name: str, value: float, bound: float) -> Bar:
    """A bar that is met from above."""
    return Bar(name, _number(value), f">= {bound:g}", value >= bound)


def not_measured(name: str, bound: str) -> Bar:
    """A bar that nothing was measured for, which does not count as met."""
    return Bar(name, None, f"{bound} (not measured)", False)


def suite(name: str, *arguments: str) -> Bar:
    """A part of the test suite that must pass, and must run at least one test."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return Bar(name, last, "all pass", done.returncode == 0 and " passed" in last and "skipped" not in last)


def command(
    name: str, text: str, quick: str, bars: Callable[..., Iterator[Bar]], arguments: Sequence[str] | None, **files: str
) -> int:  # fmt: skip
    """Run a check with ``--quick`` and ``--out``, print its bars and return its exit code.

    Args:
        name: of the target in the Makefile.
        text: for ``--help``.
        quick: what ``--quick`` leaves out.
        bars: makes the bars from ``quick`` and a report, to which it may add details; and from ``files`` by name.
        arguments: of the command line.
        files: more options, each the path of a file, and what it is.
    """
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help="write bars and details to this JSON file")
    for option, what in files.items():
        parser.add_argument(f"--{option}", type=Path, metavar="FILE", help=what)
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"command": f"make {name}" + (" QUICK=1" if options.quick else "")}
    given = {option: getattr(options, option) for option in files}
    shown: list[Bar] = []

    def kept() -> Iterator[Bar]:
        for bar in bars(options.quick, report, **given):
            shown.append(bar)
            yield bar

    short = show(kept())
    if options.out:
        write_json(options.out, report | {"bars": [bar._asdict() for bar in shown]})
    return short


def show(bars: Iterable[Bar]) -> int:
    """Print every bar as it is measured, one JSON line each; return 1 if any falls short, else 0."""
    short = 0
    for bar in bars:
        print(json.dumps(bar._asdict()), flush=True)
        short += not bar.ok
    return 1 if short else 0
