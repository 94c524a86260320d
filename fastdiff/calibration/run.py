"""``fastdiff.calibrate``: fit few-step samplers to a trained network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as File
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastdiff.calibration import classical, teacher
from fastdiff.calibration.file import Calibration, Fitted, described, name_of
from fastdiff.calibration.fit import fit
from fastdiff.calibration.parameters import Parameters
from fastdiff.calibration.walking import Begin, Family, Features, Goal
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.sampling.denoiser import Network
from fastdiff.sampling.parts import make_path, make_prediction
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import Prediction
from fastdiff.sampling.run import Ready, ready

HELD_OUT = 2**40  # first seed of the noise that judges, far from the seeds that are fitted
ALL = 10**6  # labels
KNOWN = 4  # classical samplers of which the best on all images is the one to beat
STARTS = 3  # those that a fit may begin at, as long as it gets nowhere
SCOUTED, RANKED = 8, 32  # images that choose grids, and samplers on these, among the classical ones
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-4}  # nudges well above what rounding hides; others: 0.03

Inputs = Sequence[Any] | Callable[[Sequence[int]], Mapping[str, Any]]
Report = Callable[[float, str], None]  # share that is done, 0 to 1, and what is being done


@runtime_checkable
class Runs(Protocol):
    """A pipeline, as far as calibrating one goes."""

    network: Any
    guidance_scale: float

    def ready(self, asked: Any, *, history: int | None = None, **options: Any) -> Ready:
        """See ``Pipeline.ready``."""

    def examples(self, most: int) -> Sequence[Any]:
        """Labels or prompts to try the network with, up to so many."""

    def trained(self) -> tuple[Path, Prediction]:
        """What the network was trained on, and what it predicts."""

    def model_hash(self) -> str:
        """Hash of the weights."""


class Settings(NamedTuple):
    """How much work a calibration may be."""

    samples: int = 128
    held_out: int = 128
    batch_size: int = 32
    teacher_steps: int = 128
    iterations: int = 8
    share: int = 32  # images that the first steps of a fit are computed from; later ones take more
    seed: int = 0

    def check(self, steps: Sequence[int]) -> None:
        """Raise ``PlanError`` on numbers that make no calibration."""
        for name, value in self._asdict().items():
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "seed"):
                raise PlanError(f"{name} is {value!r}; allowed: whole numbers, {int(name != 'seed')} or more")
        if not steps or any(isinstance(n, bool) or not isinstance(n, int) or not 2 <= n <= 32 for n in steps):
            raise PlanError(f"steps are {list(steps)}; allowed: one or more whole numbers from 2 to 32")
        if self.samples < self.batch_size or self.held_out < self.batch_size:
            raise PlanError(
                f"samples and held_out are {self.samples} and {self.held_out}; allowed: {self.batch_size} or more, "
                "one batch"
            )
        teacher.check_steps(self.teacher_steps, max(steps))


def calibrate(
    target: Runs | Network | Callable[..., Tensor],
    shape: Sequence[int] | None = None,
    *,
    steps: Sequence[int] = (4, 6, 8),
    inputs: Inputs | None = None,
    guidance_scale: float | tuple[float, float] | None = None,
    path: str | Path = "straight",
    prediction: str | Prediction = "velocity",
    features: Features | None = None,
    out: str | os.PathLike[str] | None = None,
    report: Report | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> Calibration:
    """Fit samplers of a few steps to a frozen network: step times, and weights that no formula ties together.

    The samplers that result cost what a classical one of as many steps costs: they are a step table like any other.
    What is fitted begins at the most accurate classical sampler, is compared with a solution of many steps, and is
    judged on noise that nothing was chosen by; where it does not beat the classical one there, that is kept instead.

    Args:
        target: a ``Pipeline`` or ``TextToImage``; or a network as ``fastdiff.sample`` takes it.
        shape: ``(C, H, W)`` of one image, for a network.
        steps: numbers of network calls to fit a sampler for.
        inputs: labels or prompts to fit with, by default the pipeline's examples. For a network: a function from the
            numbers of images to arguments of ``fastdiff.sample``, such as ``cond`` and ``uncond``; what it gives an
            image must depend on that image's number alone, as images come in batches of several sizes.
        guidance_scale: strength, or least and largest; by default the pipeline's own, and 1 for a network.
        path: of a network; pipelines know their own.
        prediction: likewise.
        features: ``[B, C, H, W] -> [B, ...]``: compared beside the images, and with the same weight.
        out: a file to write after every number of steps. One that is there already, of the same network and settings,
            is gone on with.
        report: told how far the work is.
        settings: how much work it may be.
        options: more arguments of every run, such as ``guidance`` or ``height``.

    Raises:
        PlanError: on settings or parts that do not fit one another.
        ArtifactError: if ``out`` is a calibration of something else.

    Source: step times and weights learned together: Frankel et al. 2025, arXiv:2502.17423 (S4S); Tong et al. 2024,
    arXiv:2405.15506 (LD3); Shaul et al. 2024, arXiv:2403.01329 (the family of walks).
    """
    work = settings or Settings()
    work.check(steps)
    piped = isinstance(target, Runs)
    if piped == (shape is not None):
        raise PlanError(f"shape is {shape!r}; needed for a network, (C, H, W), and not for a pipeline")
    family = Family(*(target.trained() if isinstance(target, Runs) else (make_path(path), make_prediction(prediction))))
    given = guidance_scale if guidance_scale is not None else target.guidance_scale if isinstance(target, Runs) else 1.0
    low, high = given if isinstance(given, tuple) else (given, given)
    if not low <= high:
        raise PlanError(f"guidance_scale is {given!r}; allowed: a number, or the least and the largest")

    def batch(first: int, count: int, share: float) -> Begin:
        scale = low + (high - low) * share
        images = list(range(first, first + count))
        return _begin(target, shape, inputs, images, {"guidance_scale": scale} | options)

    def batches(first: int, count: int) -> list[Begin]:
        begins = range(0, count, work.batch_size)
        sizes = [min(work.batch_size, count - i) for i in begins]
        return [batch(first + i, size, (i + size / 2) / count) for i, size in zip(begins, sizes, strict=True)]

    header = Calibration(
        model_sha256=target.model_hash() if isinstance(target, Runs) else "",
        path=described(family.path), prediction=name_of(family.prediction), guidance_scale=(float(low), float(high)),
        samples=work.samples, held_out=work.held_out,
        teacher={"solver": teacher.SOLVER, "steps": work.teacher_steps}, seed=work.seed,
    )  # fmt: skip
    found = _started(header, out)
    todo = [n for n in sorted(set(steps)) if n not in found.fitted]
    if not todo:
        return found
    dtype = getattr(getattr(target, "network", target), "dtype", torch.float32)
    worker = _Worker(family, work, features, ROUNDING.get(dtype, 0.03), report or (lambda share, what: None), len(todo))
    first = work.seed * 2**20
    begins, judges = batches(first, work.samples), batches(HELD_OUT + first, work.held_out)
    few = batch(first, min(SCOUTED, work.batch_size), work.batch_size / 2 / work.samples)  # as the first batch begins
    worker.teach(begins, judges, few)
    found = replace(found, teacher={**header.teacher, "uncertainty": worker.uncertainty})
    for n in todo:
        found = replace(found, fitted={**found.fitted, n: worker.fitted(n)})
        if out is not None:
            found.save(out)
    return found


def _started(header: Calibration, out: str | os.PathLike[str] | None) -> Calibration:
    """What an interrupted calibration left, or a new one."""
    if out is None or not File(out).exists():
        return header
    found = Calibration.load(out)
    teacher_of = {key: found.teacher.get(key) for key in header.teacher}
    if replace(found, fitted={}, teacher=teacher_of) != header:
        raise ArtifactError(
            f"{out}: a calibration of another network or with other settings: remove it, or name another"
        )
    return found


def _begin(
    target: Any, shape: Sequence[int] | None, inputs: Inputs | None, images: list[int], options: Mapping[str, Any]
) -> Begin:
    """Runs of one batch: image ``i`` has seed ``i``; inputs are drawn by the first of them."""
    if shape is not None:
        asked = dict(inputs(images)) if callable(inputs) else {}
        size = (len(images), *shape)
        return lambda sampler: ready(target, size, sampler=sampler, seed=images, **options, **asked)
    known = list(target.examples(ALL) if inputs is None else inputs)  # type: ignore[arg-type]
    if inputs is None and isinstance(known[0], str):
        raise PlanError("inputs is None; a text-to-image model is calibrated with prompts like those it will be asked")
    if known == [None]:
        return lambda sampler: target.ready(
            None, sampler=sampler, seed=images, num_images_per_prompt=len(images), **options
        )
    draw = torch.Generator().manual_seed(images[0])
    chosen = [known[int(torch.randint(len(known), (), generator=draw))] for _ in images]
    return lambda sampler: target.ready(chosen, sampler=sampler, seed=images, **options)


class _Worker:
    """The batches of a calibration and their solutions."""

    def __init__(
        self, family: Family, work: Settings, features: Features | None, nudge: float, report: Report, jobs: int
    ):
        self.family, self.work, self.features, self.nudge = family, work, features, nudge
        self._report, self._jobs, self._done = report, jobs, 0

    def _say(self, share: float, what: str) -> None:
        """The teacher counts as one job."""
        self._report(min(1.0, (self._done + share) / (self._jobs + 1)), what)

    def teach(self, begins: list[Begin], judges: list[Begin], few: Begin) -> None:
        """Solve all batches; ``few`` are the first images of the first."""
        seen = 0

        def solved(_: int) -> None:
            nonlocal seen
            seen += 1
            self._say(seen / (len(begins) + len(judges)), "teacher")

        steps = self.work.teacher_steps
        passed = teacher.follow(begins, self.family, steps, 1, solved)
        judged = teacher.follow(judges, self.family, steps, 0, solved)
        self.way = passed[0]
        self.few = Goal([few], [self.way.end[: min(SCOUTED, self.work.batch_size)]], self.family, self.features)
        self.goal = Goal(begins, [one.end for one in passed], self.family, self.features)
        self.judge = Goal(judges, [one.end for one in judged], self.family, self.features)
        self.uncertainty = teacher.uncertainty(begins[0], self.family, steps, self.way.end)
        self._done = 1

    def fitted(self, calls: int) -> Fitted:
        """The sampler of one number of calls."""
        work, size = self.work, self.work.batch_size
        self._say(0.0, f"{calls} steps: classical samplers")
        ranked = classical.ranked(calls, self.way, self.few, self.goal.part(max(1, RANKED // size)))
        order = sorted((self.goal.error(one.walk), i) for i, one in enumerate(ranked[:KNOWN]))
        ranked[:KNOWN] = [ranked[i] for _, i in order]
        best, (least, _) = ranked[0], order[0]
        walk, beaten = best.walk, 0.9 * least
        # a walk of fewer calls has fewer weights, and one that asks twice at a time has no room to move it
        free = [
            one for one in ranked if len(one.walk.weights) == calls and all(a > b for a, b in pairwise(one.walk.times))
        ]
        for one in free[:STARTS]:
            start = Parameters.of(self.family.path, one.solver, one.walk)
            options = {"share": max(1, work.share // size), "nudge": self.nudge, "seed": work.seed + calls}
            for progress in fit(self.goal, start, iterations=work.iterations, **options):
                if progress.error < least:
                    walk, least = progress.parameters.walk(), progress.error
                self._say((progress.step + 1) / (work.iterations + 1), f"{calls} steps: error {progress.error:.4g}")
            if least < beaten:  # else another may have a valley to follow
                break
        theirs, ours = self.judge.error(best.walk), self.judge.error(walk)
        self._done += 1
        self._say(0.0, f"{calls} steps: {ours:.4g}, {best.name} {theirs:.4g}")
        kept = ours < theirs
        chosen = walk if kept else best.walk
        return Fitted(chosen.times, chosen.weights, min(ours, theirs), best.name, theirs, kept, ours, chosen.scale)
