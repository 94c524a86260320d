"""Reading a scheduler's settings: an object, a dict, or a ``scheduler_config.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, TypeVar

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers.defaults import DEFAULTS, KNOWN, REFUSED

MOST_TRAINED = 100_000
FILE = "scheduler_config.json"
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Options:
    """The settings of one scheduler: what its file says, filled up with its class's defaults.

    A file may hold settings of other classes, for diffusers carries them along when a scheduler is made from another
    one's settings; the class does not read them, so neither do we. Names that no class knows are refused.

    Args:
        name: the diffusers class.
        given: what the file or object says.
    """

    name: str
    given: dict[str, Any]

    def __post_init__(self) -> None:
        unknown = sorted(key for key in self.given if not key.startswith("_") and key not in KNOWN)
        if unknown:
            raise PlanError(f"{self.name} has settings no diffusers scheduler knows: {', '.join(unknown)}")
        for key, default in DEFAULTS[self.name].items():
            if isinstance(default, float | int) and not isinstance(default, bool):
                self._check_number(key)

    def _check_number(self, key: str) -> None:
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, float | int) or value != value or value == math.inf:
            raise self.refuse(key, "allowed: a finite number")
        if key == "num_train_timesteps" and not (value == int(value) and 1 <= value <= MOST_TRAINED):
            raise self.refuse(key, f"allowed: a whole number from 1 to {MOST_TRAINED}")

    def __getitem__(self, key: str) -> Any:
        return self.given[key] if key in self.given else DEFAULTS[self.name][key]

    def stray(self, key: str) -> Any:
        """A setting that some methods of diffusers look for in every scheduler's settings; None where absent."""
        return self.given.get(key, DEFAULTS[self.name].get(key))

    def has(self, key: str) -> bool:
        """Does this class have such a setting?"""
        return key in DEFAULTS[self.name]

    def refuse(self, key: str, why: str) -> PlanError:
        """Return the error that refuses this class's value of a setting."""
        return PlanError(f"{self.name} with {key}={self[key]!r}: {why}")

    def choose(self, key: str, allowed: Mapping[Any, Choice]) -> Choice:
        """Translate a setting.

        Raises:
            PlanError: listing the values allowed.
        """
        value = self[key]
        if not isinstance(value, str | int) or value not in allowed:
            raise self.refuse(key, f"allowed: {', '.join(map(repr, allowed))}")
        return allowed[value]

    def flag(self, key: str) -> bool:
        """A setting that is on or off; None counts as off, as in diffusers."""
        value = self[key]
        if value not in (True, False, None):
            raise self.refuse(key, "allowed: true, false")
        return bool(value)


def read(source: Any) -> Options:
    """Read the settings of a scheduler.

    Args:
        source: a diffusers scheduler, its ``config``, or a path to ``scheduler_config.json`` or the folder around it.

    Raises:
        PlanError: if there is no such file, or its class is unknown or does not fit.
    """
    if isinstance(source, str | PathLike):
        name, given = None, _read_file(FilePath(source))
    elif isinstance(source, Mapping):
        name, given = None, dict(source)
    elif isinstance(getattr(source, "config", None), Mapping):
        # an object made from another class's settings carries that class's name in them
        name, given = type(source).__name__, dict(source.config)
    else:
        raise PlanError(f"{type(source).__name__} is no scheduler, no dict of its settings and no path to them")
    name = given.get("_class_name") if name is None else name
    if name in REFUSED:
        raise PlanError(f"{name} is not supported: {REFUSED[name]}")
    if name not in DEFAULTS:
        raise PlanError(f"unknown scheduler class {name!r}; allowed: {', '.join(sorted(DEFAULTS))}")
    return Options(name, given)


def _read_file(path: FilePath) -> dict[str, Any]:
    candidates: Sequence[FilePath] = [path / FILE, path / "scheduler" / FILE] if path.is_dir() else [path]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise PlanError(f"no {FILE} at {str(path)!r}; give the file, its folder, or the model's folder")
    try:
        given = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{found} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise PlanError(f"{found} holds a {type(given).__name__}; allowed: an object of settings")
    return given
