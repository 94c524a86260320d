"""``calibration.json``: the few-step samplers that were fitted to one network, and how good they are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path as File
from typing import Any

from fastdiff.errors import ArtifactError, PlanError
from fastdiff.models.files import read_json, write_text
from fastdiff.sampling.parts import initial_scale
from fastdiff.sampling.path import Path, log_snr
from fastdiff.sampling.prediction import PREDICTIONS, Prediction
from fastdiff.sampling.run import Plan, Planner
from fastdiff.sampling.solvers import Solver
from fastdiff.sampling.solvers.non_stationary import NonStationary, registers
from fastdiff.sampling.steering import Strength

Chosen = str | Solver | Planner
NAME = "calibration.json"
CALIBRATED = "calibrated"  # the name that asks for what lies in the model's folder
AUTO = "auto"
FORMAT = 1
PROBES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of a path at which two of them are compared


@dataclass(frozen=True)
class Fitted:
    """The sampler of one number of network calls. Errors are root mean squares relative to the solution's own size,
    on noise that nothing was chosen by.
    """

    times: tuple[float, ...]  # of the calls, and where the walk ends
    weights: tuple[Mapping[str, float], ...]
    error: float
    classical: str  # the most accurate of the samplers that were tried
    classical_error: float
    calibrated: bool  # False: what was fitted did not beat the classical one, which is walked instead
    fitted_error: float  # of what was fitted, kept or not
    scale: float = 1.0  # of the starting noise, over the standard deviation of the path's marginal at the first time

    def solver(self) -> NonStationary:
        """The walk."""
        return NonStationary(self.times, self.weights, self.scale)


@dataclass(frozen=True)
class Calibration:
    """Samplers by their number of network calls; what they were fitted to, and how.

    Args:
        model_sha256: hash of the network's weights; empty for a function.
        path: what tells it from others, see ``described``.
        prediction: what the network predicts.
        guidance_scale: least and largest strength that was fitted.
        samples, held_out: images that were fitted, and that judged.
        teacher: the solution they were compared with: solver, steps, and its own relative uncertainty.
        seed: of all noise.
        fitted: by number of network calls.
    """

    model_sha256: str
    path: Mapping[str, Any]
    prediction: str
    guidance_scale: tuple[float, float]
    samples: int
    held_out: int
    teacher: Mapping[str, Any]
    seed: int
    fitted: Mapping[int, Fitted] = field(default_factory=dict)

    # --- choosing ---------------------------------------------------------------------------------------------------

    def steps(self, asked: int | str | None, tolerance: float | None = None) -> int:
        """Return a number of steps: the one asked for, the largest for None, or for ``"auto"`` the least whose
        error on held-out noise is within ``tolerance``.

        Raises:
            PlanError: naming what there is.
        """
        known = sorted(self.fitted)
        if asked == AUTO:
            if tolerance is None or not tolerance > 0:
                raise PlanError(f"tolerance is {tolerance!r}; num_inference_steps 'auto' needs one, above 0")
            found = next((n for n in known if self.fitted[n].error <= tolerance), None)
            if found is None:
                errors = ", ".join(f"{n}: {self.fitted[n].error:.3g}" for n in known)
                raise PlanError(f"tolerance is {tolerance:g}; this calibration's errors by steps are {errors}")
            return found
        if asked is not None and asked not in self.fitted:
            allowed = ", ".join(map(str, known))
            raise PlanError(f"num_inference_steps is {asked!r}; this calibration has {allowed}, or 'auto'")
        return known[-1] if asked is None else int(asked)

    def check(self, model_sha256: str, force: bool = False) -> None:
        """Raise ``ArtifactError`` if the network is another one."""
        if model_sha256 != self.model_sha256 and not force:
            raise ArtifactError(
                f"this calibration is of the network {self.model_sha256[:12] or 'without a hash'}, the network here is "
                f"{model_sha256[:12] or 'without a hash'}: run fastdiff calibrate for it, or force it"
            )

    def check_strength(self, guidance_scale: Strength | Sequence[Strength]) -> None:
        """Raise ``PlanError`` on a strength of guidance that was not fitted."""
        low, high = self.guidance_scale
        for strength in guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale]:
            if not isinstance(strength, int | float) or not low - 1e-9 <= strength <= high + 1e-9:
                allowed = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                raise PlanError(f"guidance_scale is {strength!r}; this calibration was made for {allowed}")

    def sampler(self, path: Path, prediction: Prediction) -> Calibrated:
        """What ``fastdiff.sample`` takes as ``sampler``, for a network of this path and prediction.

        Raises:
            PlanError: if they are not those that the calibration was made for.
        """
        if not same(self.path, described(path)):
            raise PlanError(f"this calibration is for the path {self.path['kind']}; the network's is {path!r:.100}")
        if self.prediction != name_of(prediction):
            raise PlanError(f"this calibration is for a network of {self.prediction!r}; this is {prediction!r}")
        return Calibrated(self, path, prediction)

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        values = asdict(self) | {"fitted": {str(n): asdict(self.fitted[n]) for n in sorted(self.fitted)}}
        write_text(File(file), json.dumps({"format": FORMAT, **values}, indent=1) + "\n")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Calibration:
        """Read a file.

        Raises:
            ArtifactError: if it is missing or damaged, naming what is wrong.
        """
        values = read_json(File(file))
        if values.pop("format", None) != FORMAT:
            raise ArtifactError(f"{file}: not a calibration of format {FORMAT}")
        try:
            entries = values.pop("fitted")
            found = cls(**values, fitted={int(n): _fitted(int(n), entry) for n, entry in entries.items()})
            low, high = (float(v) for v in found.guidance_scale)
            if not low <= high or not isinstance(found.path, dict) or found.prediction not in PREDICTIONS:
                raise ValueError("guidance_scale, path or prediction")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{file}: damaged: {error}") from error
        return cls(**{f.name: getattr(found, f.name) for f in fields(cls)} | {"guidance_scale": (low, high)})


@dataclass(frozen=True)
class Calibrated:
    """A calibration in the place of a sampler: it brings path, prediction and times with it."""

    calibration: Calibration
    path: Path
    prediction: Prediction

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
    ) -> Plan:
        """See ``fastdiff.sampling.run.Planner``."""
        given = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
        wrong = next((name for name, value in given.items() if value is not None), None)
        if wrong:
            raise PlanError(f"a calibrated sampler takes no {wrong}: its times and weights belong together")
        chosen = self.calibration.fitted[self.calibration.steps(num_inference_steps)].solver()
        scale = chosen.scale * initial_scale(self.path, chosen.times[0])
        return Plan(self.path, self.prediction, chosen, chosen.times, scale)

    def timesteps(self, num_inference_steps: int) -> list[float]:
        """The times of a calibrated sampler in the network's units, for other libraries' ``timesteps``."""
        times = self.calibration.fitted[self.calibration.steps(num_inference_steps)].times
        return [self.path.timestep(t) for t in times[:-1]]

    def sigmas(self, num_inference_steps: int) -> list[float]:
        """The times of a calibrated sampler as the field's noise levels, for other libraries' ``sigmas``."""
        times = self.calibration.fitted[self.calibration.steps(num_inference_steps)].times
        return [self.path.field_sigma(t) for t in times[:-1]]


def place_of(folder: File) -> File:
    """Where the calibration of a model's folder lies; diffusers keeps networks in folders inside that of the model."""
    home = folder.parent if (folder.parent / "model_index.json").is_file() else folder
    return home / NAME


def load_for(
    trained: tuple[Path, Prediction],
    model_sha256: str,
    folder: File | None,
    file: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Calibrated:
    """The calibration of a network of this path, prediction and hash: from ``file``, or from the model's ``folder``.

    Raises:
        ArtifactError: if there is none, it is damaged, or of another network and not forced.
        PlanError: if path or prediction are not those it was made for.
    """
    if file is None and folder is None:
        raise ArtifactError("this model came from no folder: load its calibration with load_calibration(file)")
    place = place_of(File(folder)) if file is None else File(file)  # type: ignore[arg-type]
    if not place.is_file():
        raise ArtifactError(f"{place}: no such file; fastdiff calibrate makes one")
    found = Calibration.load(place)
    found.check(model_sha256, force)
    return found.sampler(*trained)


def settle(
    sampler: Chosen, steps: int | str | None, tolerance: float | None, load: Callable[[], Calibrated]
) -> tuple[Chosen, int | str | None]:
    """The sampler and the number of steps of a call: a calibrated one by name is loaded, and says how many it has.

    Args:
        sampler: what is asked for.
        steps: likewise; ``"auto"`` stays where nothing is calibrated, None where nothing is asked for.
        tolerance: belongs to ``"auto"``.
        load: the model's calibration.

    Raises:
        PlanError: if there is no such number of steps, or a tolerance without ``"auto"``.
    """
    chosen = load() if sampler == CALIBRATED else sampler
    if isinstance(chosen, Calibrated):
        return chosen, chosen.calibration.steps(steps, tolerance)
    if tolerance is not None and steps != AUTO:
        raise PlanError(f"tolerance is {tolerance:g}, num_inference_steps {steps!r}; it goes with 'auto'")
    return chosen, steps


def _fitted(steps: int, entry: Mapping[str, Any]) -> Fitted:
    found = Fitted(**entry)
    times = tuple(float(t) for t in found.times)
    weights = tuple({name: float(w) for name, w in row.items()} for row in found.weights)
    numbers = [*times, found.error, found.classical_error, *(w for row in weights for w in row.values())]
    if not all(math.isfinite(n) for n in numbers) or any(a < b for a, b in pairwise(times)):
        raise ValueError(f"times or numbers of {steps} steps")
    if not (math.isfinite(found.scale) and found.scale > 0):
        raise ValueError(f"scale of {steps} steps")
    if not 1 <= len(weights) <= steps or len(times) != len(weights) + 1:
        raise ValueError(f"{len(weights)} rows and {len(times)} times of {steps} steps")
    for i, row in enumerate(weights):
        if not set(row) <= set(registers(i)):
            raise ValueError(f"row {i} of {steps} steps reads {sorted(row)}; allowed: {', '.join(registers(i))}")
    return Fitted(**{**asdict(found), "times": times, "weights": weights})


def name_of(prediction: Prediction) -> str:
    """The name of a prediction.

    Raises:
        PlanError: if it has none.
    """
    name = next((name for name, known in PREDICTIONS.items() if known == prediction), None)
    if name is None:
        raise PlanError(f"the prediction {prediction!r} has no name; allowed: {', '.join(PREDICTIONS)}")
    return name


def described(path: Path) -> dict[str, Any]:
    """What tells a path from others: its kind, its ends and its noise levels between them."""
    span = path.t_end - path.t_start
    levels = [log_snr(path, path.t_start + share * span) for share in PROBES]
    return {"kind": type(path).__name__, "ends": [path.t_start, path.t_end], "log_snr": levels}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Do two descriptions mean one path, whatever the last digits say?"""
    if one.get("kind") != other["kind"] or len(one.get("log_snr", ())) != len(PROBES):
        return False
    pairs = zip([*one["ends"], *one["log_snr"]], [*other["ends"], *other["log_snr"]], strict=True)
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs)
