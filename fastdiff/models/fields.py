"""Checks of the values of a ``config.json``, before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fastdiff.errors import ArtifactError
from fastdiff.models.files import shown

_Config = TypeVar("_Config")


def read_fields(
    cls: type[_Config], config: Mapping[str, Any], class_name: str, fixed: Mapping[str, tuple[Any, ...]]
) -> _Config:
    """Make a config dataclass of a ``config.json``; its values are not checked yet.

    Raises:
        ArtifactError: naming a key that is unknown, or that is ``fixed`` to other values.
    """
    name = config.get("_class_name", class_name)
    if name != class_name:
        raise ArtifactError(f"config.json: _class_name is {shown(name)}; supported is {class_name!r}")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key in known:
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in fixed:
            if value not in fixed[key]:
                raise ArtifactError(f"config.json: {key} is {shown(value)}; supported: {fixed[key]}")
        elif not key.startswith("_"):
            raise ArtifactError(f"config.json: unknown key {shown(key)} (value {shown(value)})")
    return cls(**values)


def need(condition: bool, config: Any, key: str, allowed: str) -> None:
    """Refuse a value of a config by name."""
    if not condition:
        raise ArtifactError(f"config.json: {key} is {shown(getattr(config, key))}; allowed: {allowed}")


def need_sizes(config: Any, **most: int) -> None:
    """Refuse what is not a whole number from 1 to its limit."""
    for key, limit in most.items():
        need(is_size(getattr(config, key), limit), config, key, f"a whole number from 1 to {limit}")


def is_size(value: Any, most: int) -> bool:
    """Is it a whole number from 1 to ``most``?"""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_number(value: Any) -> bool:
    """Is it a finite number?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
