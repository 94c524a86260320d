"""``fastdiff calibrate``: few-step samplers fitted to a model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdiff.backends import BACKENDS
from fastdiff.calibration.file import NAME, Calibration
from fastdiff.calibration.run import Settings, calibrate
from fastdiff.cli.common import show
from fastdiff.cli.generate import DTYPES
from fastdiff.errors import PlanError
from fastdiff.pipeline import BUNDLED, Pipeline, resolve

USUAL = Settings()


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = command.add_argument
    add("--steps", default="4,6,8", metavar="N,N", help="numbers of network calls to fit for (default: 4,6,8)")
    add("--out", type=Path, help=f"file to write, or to go on with (default: {NAME} in the model's folder, "
        "for bundled models in this one)")  # fmt: skip
    add(
        "--guidance-scale", type=float, nargs="+", metavar="STRENGTH",
        help="one strength, or the least and the largest (default: the model's own)",
    )  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line, for text-to-image models")
    add("--samples", type=int, default=USUAL.samples, help=f"images to fit (default: {USUAL.samples})")
    add("--held-out", type=int, default=USUAL.held_out, help=f"images that judge (default: {USUAL.held_out})")
    add("--batch-size", type=int, default=USUAL.batch_size, help=f"(default: {USUAL.batch_size})")
    add(
        "--teacher-steps", type=int, default=USUAL.teacher_steps,
        help=f"steps of the solution to come close to (default: {USUAL.teacher_steps})",
    )  # fmt: skip
    add("--iterations", type=int, default=USUAL.iterations, help=f"steps of a fit (default: {USUAL.iterations})")
    add("--seed", type=int, default=USUAL.seed, help=f"of all noise (default: {USUAL.seed})")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=sorted(DTYPES))
    add("--backend", default="auto", choices=sorted(BACKENDS))


def run(options: argparse.Namespace) -> int:
    """``fastdiff calibrate``."""
    try:
        steps = sorted({int(part) for part in options.steps.split(",")})
    except ValueError:
        raise PlanError(f"--steps is {options.steps!r}; allowed: numbers and commas, as 4,6,8") from None
    strengths = options.guidance_scale
    if strengths is not None and len(strengths) > 2:
        raise PlanError(f"--guidance-scale has {len(strengths)} numbers; allowed: one, or the least and the largest")
    pipe: Any = Pipeline.from_pretrained(
        options.model, device=options.device, dtype=DTYPES[options.dtype], backend=options.backend
    )
    folder = resolve(options.model)
    # a bundled model lies where the package was installed, which is nobody's place to write
    out = options.out or (Path(NAME) if folder.parent == BUNDLED else folder / NAME)
    settings = Settings(**{name: getattr(options, name) for name in Settings._fields if hasattr(options, name)})
    start = time.perf_counter()
    quiet = options.json or not sys.stderr.isatty()
    with tqdm(desc="calibrating", total=100, disable=quiet, bar_format="{desc} {percentage:3.0f} %|{bar}|") as bar:

        def report(share: float, what: str) -> None:
            bar.n = 100 * share
            bar.set_description_str(what)

        found = calibrate(
            pipe, steps=steps, inputs=_prompts(options.prompts), out=out, report=report, settings=settings,
            guidance_scale=None if strengths is None else strengths[0] if len(strengths) == 1 else tuple(strengths),
        )  # fmt: skip
    facts = {"file": str(out), "seconds": time.perf_counter() - start, "teacher": dict(found.teacher),
             "steps": {n: {"error": f.error, "classical": f.classical, "classical_error": f.classical_error,
                           "calibrated": f.calibrated} for n, f in sorted(found.fitted.items())}}  # fmt: skip
    show(options, facts, f"{table(found)}\n\n{out}: {facts['seconds']:.0f} s")
    return 0


def table(found: Calibration) -> str:
    """Errors on held-out noise, as text."""
    lines = ["steps     error  classical   ratio  the best classical sampler"]
    for n, one in sorted(found.fitted.items()):
        note = "" if one.calibrated else ", which is kept"
        ratio = one.error / one.classical_error
        lines.append(f"{n:5d} {one.error:9.4f} {one.classical_error:10.4f} {ratio:7.2f}  {one.classical}{note}")
    return "\n".join(lines)


def _prompts(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise PlanError(f"--prompts {file} holds no prompt; allowed: a prompt a line")
    return lines
