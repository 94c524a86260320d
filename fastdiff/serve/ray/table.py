"""The table of an offline run, a row for each image: CSV, JSON lines or Parquet, checked before anything is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.errors import ArtifactError, PlanError
from fastdiff.serve.schema import MAX_SEED

# column: type of Arrow. All but the name and the seed are options of ``Engine.submit``.
COLUMNS = {
    "name": "string",
    "seed": "int64",
    "class_label": "int64",
    "prompt": "string",
    "negative_prompt": "string",
    "num_inference_steps": "int64",
    "guidance_scale": "float64",
    "sampler": "string",
}
LEAST = {"seed": 0, "class_label": 0, "num_inference_steps": 1, "guidance_scale": 0.0}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
FORMATS = (".csv", ".jsonl", ".parquet")


class Row(NamedTuple):
    """One image."""

    name: str  # of its file, less ``.png``
    seed: int
    options: dict[str, Any]  # of ``Engine.submit``

    def facts(self) -> str:
        """The row as it is kept in its picture."""
        return json.dumps({"seed": self.seed, **self.options}, sort_keys=True)


def read_table(file: Path, seed: int = 0, usual: Mapping[str, Any] | None = None) -> list[Row]:
    """Read a table: a column that is missing, or a value that is, is as usual.

    Args:
        file: ``.csv``, ``.jsonl`` or ``.parquet``, with the columns of ``COLUMNS``.
        seed: of the first row, where the table has none; row ``i`` has ``seed + i``.
        usual: options for rows that do not say.

    Raises:
        ArtifactError: if it cannot be read.
        PlanError: naming the first column or value that is not allowed.
    """
    if file.suffix not in FORMATS:
        raise PlanError(f"{file}: a table is {', '.join(FORMATS)}")
    table = _read(file)
    unknown = [name for name in table.column_names if name not in COLUMNS]
    if unknown:
        raise PlanError(f"{file}: column {ascii(unknown[0])}; allowed: {', '.join(COLUMNS)}")
    if not table.num_rows or not table.num_columns:
        raise PlanError(f"{file}: no rows")
    rows = [_row(file, i, found, seed + i, usual or {}) for i, found in enumerate(table.to_pylist())]
    seen: dict[str, int] = {}
    for i, row in enumerate(rows):
        if row.name in seen:
            raise PlanError(f"{file}, row {i}: name {row.name} is that of row {seen[row.name]} too")
        seen[row.name] = i
    return rows


def _read(file: Path) -> Any:
    """A file as a ``pyarrow.Table`` with the types of ``COLUMNS``."""
    import pyarrow
    from pyarrow import csv, parquet
    from pyarrow import json as lines

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])
    try:
        if file.suffix == ".csv":
            # text is as it stands, but an empty field is none: a row without a prompt, or with the usual sampler
            kept = csv.ConvertOptions(
                column_types=schema, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
            )
            return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=kept)
        if file.suffix == ".jsonl":
            return lines.read_json(file, parse_options=lines.ParseOptions(explicit_schema=schema))
        table = parquet.read_table(file)
        known = [name for name in table.column_names if name in COLUMNS]
        return table if len(known) < table.num_columns else table.cast(pyarrow.schema([schema.field(n) for n in known]))
    except (OSError, pyarrow.ArrowException) as error:
        raise ArtifactError(f"{file}: {str(error).splitlines()[0]}") from error


def _row(file: Path, i: int, found: Mapping[str, Any], seed: int, usual: Mapping[str, Any]) -> Row:
    given = dict(usual) | {key: value for key, value in found.items() if value is not None}
    for key, least in LEAST.items():
        if key in given and not least <= given[key] <= MAX_SEED:
            raise PlanError(f"{file}, row {i}: {key} is {given[key]}; allowed: from {least} on")
    if "prompt" in given and "class_label" in given:
        raise PlanError(f"{file}, row {i}: class_label and prompt; allowed: one of them, as the model takes")
    name = given.pop("name", f"{i:08d}")
    if not NAME.fullmatch(name):
        raise PlanError(f"{file}, row {i}: name {ascii(name)[:60]}; allowed: up to 200 of A-Z a-z 0-9 _ - and, "
                        "not in front, .")  # fmt: skip
    return Row(name, given.pop("seed", seed), given)
