"""Step tables on disk: the numbers in a safetensors file, what the host knows of each row in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import ArtifactError
from fastdiff.sampling.guidance import Guided
from fastdiff.sampling.table import FIRST_HISTORY, FIRST_WEIGHT, OUTPUTS, RowPlan, StepTable, Structure

MAX_HISTORY = 64


def to_json(structure: Structure) -> dict[str, Any]:
    """Return a structure as what JSON can hold."""
    rows = [row._asdict() | {"guided": None if row.guided is None else row.guided._asdict()} for row in structure.rows]
    return structure._asdict() | {"rows": rows}


def from_json(values: Mapping[str, Any], numbers: Tensor, source: str) -> StepTable:
    """Return a table from what ``to_json`` gave and its numbers ``[R, K]`` float32.

    Raises:
        ArtifactError: if they are damaged, or do not fit one another.
    """
    try:
        rows = tuple(_row(dict(row)) for row in values["rows"])
        structure = Structure(**(dict(values) | {"rows": rows}))
        _check(structure, numbers)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{source}: not a step table ({type(error).__name__}: {error})") from error
    return StepTable(numbers, torch.arange(len(rows)), structure)


def _row(values: dict[str, Any]) -> RowPlan:
    for name in ("x", "anchor", "history", "draws"):
        if values[name] is not None or name != "anchor":
            values[name] = tuple(values[name])
    if values["guided"] is not None:
        values["guided"] = Guided(**values["guided"])
    return RowPlan(**values)


def _check(structure: Structure, numbers: Tensor) -> None:
    """A ValueError says what would make the loop read beyond its registers, or mean something else."""
    history = structure.history
    if type(history) is not int or not 0 <= history <= MAX_HISTORY or type(structure.draws) is not int:
        raise ValueError(f"history is {history!r}, draws {structure.draws!r}")
    registers = FIRST_HISTORY + history
    wanted = (len(structure.rows), FIRST_WEIGHT + OUTPUTS * registers)
    if not structure.rows or tuple(numbers.shape) != wanted or numbers.dtype != torch.float32:
        raise ValueError(f"numbers are {numbers.dtype} {list(numbers.shape)}; needed: float32 {list(wanted)}")
    if bool(numbers.isnan().any()) or not bool(numbers[:, FIRST_WEIGHT:].isfinite().all()):
        raise ValueError("a weight is not finite")  # bounds may be: no bound is an infinite one
    for row in structure.rows:
        read = {*row.x, *(row.anchor or ()), *row.history}
        if not all(type(register) is int and 0 <= register < registers for register in read):
            raise ValueError(f"registers {sorted(map(str, read))} of {registers}")
        flags = [row.ends, row.clipped, row.asks, row.learned, *row.draws, *(row.guided or ())]
        if (
            not all(type(flag) is bool for flag in flags)
            or len(row.draws) != 2
            or type(row.push) not in (bool, type(None))
        ):
            raise ValueError(f"flags {flags}")
        if row.deep is not None:
            raise ValueError("a row keeps deep features, which exported networks do not give")
        if row.guided is not None and row.guided.momentum and structure.momentum is not True:
            raise ValueError("a row needs momentum that the table does not keep")
        if row.tail is not None and not 0 <= float(row.tail) <= 1:
            raise ValueError(f"tail {row.tail!r}")
