"""The parts a plan is made of that only diffusers' schedulers need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers.options import Options
from fastdiff.sampling.clipping import Clip, DynamicThreshold
from fastdiff.sampling.path import EDM, Path, RectifiedFlow, TrigFlow
from fastdiff.sampling.prediction import X0, Coefficients, Eps, Prediction, V
from fastdiff.sampling.prediction.base import Target
from fastdiff.sampling.solvers import Row


class Request(NamedTuple):
    """What the caller of one run asks for; None: as diffusers does by itself."""

    steps: int | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    eta: float | None
    mu: float | None

    def counted(self) -> int:
        """The number of steps asked for.

        Raises:
            PlanError: if there is none.
        """
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PlanError(f"num_inference_steps is {self.steps!r}; allowed: a whole number, 1 or more")
        return self.steps


@dataclass(frozen=True)
class Told:
    """A path whose network is told what diffusers tells it at each time.

    Args:
        path: the path itself.
        told: by time, for the times of the list.
        between: for the other times, the stages of a step; the path's own where None.
    """

    path: Path
    told: Mapping[float, float]
    between: Callable[[float], float] | None = None

    @property
    def t_start(self) -> float:
        return self.path.t_start

    @property
    def t_end(self) -> float:
        return self.path.t_end

    @property
    def t_min(self) -> float:
        return self.path.t_min

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        return self.path.alpha_sigma(t)

    def rate(self, t: float) -> tuple[float, float]:
        return self.path.rate(t)

    def time(self, log_snr: float) -> float:
        return self.path.time(log_snr)

    def timestep(self, t: float) -> float:
        if t in self.told:
            return self.told[t]
        return self.path.timestep(t) if self.between is None else self.between(t)

    def from_timestep(self, timestep: float) -> float:
        found = next((t for t, told in self.told.items() if told == timestep), None)
        if found is None:
            raise PlanError(f"timestep {timestep!r} is not in this list; allowed: {sorted(self.told.values())}")
        return found

    def field_sigma(self, t: float) -> float:
        return self.path.field_sigma(t)

    def from_sigma(self, sigma: float) -> float:
        return self.path.from_sigma(sigma)

    def train_time(self, u: float) -> float:
        return self.path.train_time(u)


@dataclass(frozen=True)
class Written:
    """A solver whose rows are written down beforehand, where diffusers steps unlike any method with a name.

    It walks its own list, or the last times of it (image to image).

    Args:
        walk: the rows of the whole list.
        history: registers they use.
        remembers: do rows use what was pushed in an earlier step? Then the walk cannot start in the middle.
    """

    walk: tuple[Row, ...]
    history: int = 0
    remembers: bool = False
    order: int = field(default=1, init=False)
    jumps: bool = field(default=False, init=False)

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        begins = [i for i in range(len(self.walk)) if i == 0 or self.walk[i - 1].ends]
        first = next((i for i in begins if self.walk[i].t == times[0]), None)
        if first is None or (first > 0 and self.remembers):
            raise PlanError(f"this scheduler's steps cannot start at t={times[0]!r}, in the middle of its list")
        drawn = [draw for row in self.walk[first:] for draw in row.draws if draw is not None]
        before = min(drawn, default=0) if first else 0

        def number(draw: int | None) -> int | None:
            return None if draw is None else draw - before

        return tuple(row._replace(draws=(number(row.draws[0]), number(row.draws[1]))) for row in self.walk[first:])


@dataclass(frozen=True)
class Linear:
    """``D = c_skip * x + c_out * F(c_in * x)``, the coefficients from the levels and what the network is told.

    Args:
        formula: ``(alpha, sigma, told) -> (c_in, c_skip, c_out)``.
    """

    formula: Callable[[float, float, float], tuple[float, float, float]]
    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=False, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        told = path.timestep(t)
        return Coefficients(*self.formula(*path.alpha_sigma(t), told), told, told)

    def target(self, path: Path, t: float) -> Target:
        raise PlanError("this prediction is for sampling as a diffusers scheduler does; train one of fastdiff's")


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Eps(),
    "sample": X0(),
    "original_sample": X0(),
    "v_prediction": V(),
}


def prediction(options: Options, *allowed: str) -> Prediction:
    """What the network predicts, by diffusers' name."""
    return options.choose("prediction_type", {name: PREDICTIONS[name] for name in allowed})


def clip(options: Options, reads_clip: bool = False) -> Clip | None:
    """How the denoised estimate is bounded; thresholding goes before clipping, as in diffusers."""
    if options.has("thresholding") and options.flag("thresholding"):
        return DynamicThreshold(options["dynamic_thresholding_ratio"], options["sample_max_value"])
    if reads_clip and options.flag("clip_sample"):
        return float(options["clip_sample_range"])
    return None


def circle(times: Sequence[float], told: Sequence[float], between: Callable[[float], float] | None = None) -> Told:
    """The variance-preserving path with the angle ``atan(sigma / alpha)`` as its time.

    Every list of betas is this path up to its time, so the levels of the list are enough.

    Args:
        times: angles at which the network is asked.
        told: what it is told there.
        between: what it is told at other levels ``sigma / alpha``.
    """
    return Told(TrigFlow(1.0), _pairs(times, told), None if between is None else lambda t: between(math.tan(t)))


def straight(times: Sequence[float], told: Sequence[float], scale: float) -> Told:
    """The straight path; between the list's times the network is told ``scale`` times the time."""
    return Told(RectifiedFlow(), _pairs(times, told), lambda t: scale * t)


def exploding(levels: Sequence[float], told: Sequence[float], between: Callable[[float], float] | None = None) -> Told:
    """The path ``x0 + sigma z`` with the level as its time."""
    return Told(EDM(sigma_max=max(levels)), _pairs(levels, told), between)


def _pairs(times: Sequence[float], told: Sequence[float]) -> dict[float, float]:
    pairs: dict[float, float] = {}
    for t, value in zip(times, told, strict=False):
        if pairs.setdefault(t, float(value)) != float(value):
            raise PlanError(
                f"the list holds one noise level twice, told {pairs[t]} and {float(value)}; ask for less steps"
            )
    return pairs


def angle(level: float) -> float:
    """The time on ``circle`` of a level ``sigma / alpha``."""
    return math.atan(level)


def unrounded(level: float, end: float) -> float:
    """Where a run ends that is to end at ``end``: at its last level, if that is the same but for rounding."""
    return level if end > 0 and abs(level / end - 1) < 1e-6 else end


def falling(name: str, times: Sequence[float]) -> tuple[float, ...]:
    """Check a list of times; only the last may repeat the one before.

    Raises:
        PlanError: if they rise or stand still on the way.
    """
    values = tuple(float(t) for t in times)
    steps = list(zip(values, values[1:], strict=False))
    if not all(math.isfinite(t) for t in values) or any(a <= b for a, b in steps[:-1]) or any(a < b for a, b in steps):
        raise PlanError(f"{name} makes a list of times that does not fall: {list(values)[:4]}...{list(values)[-3:]}")
    return values
