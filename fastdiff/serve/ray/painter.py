"""A worker of an offline run: rows in, files out. It skips what is there already, so it may be killed at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastdiff.engine import Engine, Ticket
from fastdiff.errors import FastdiffError
from fastdiff.images import save_png
from fastdiff.serve.ray.source import Source
from fastdiff.serve.ray.table import Row

if TYPE_CHECKING:
    import numpy as np

DRAWN, KEPT, FAILED = "drawn", "kept", "failed"
Columns = dict[str, list[str]]


def is_made(file: Path, facts: dict[str, str]) -> bool:
    """Is there a whole picture that was made from the same row by the same model?"""
    try:
        with Image.open(file) as picture:
            told = {name: picture.info.get(name) for name in facts}
            picture.verify()  # the checksum of every part
            return told == facts
    except (OSError, SyntaxError, ValueError):
        return False


class Painter:
    """Draws rows with an engine, so that an image's bits do not depend on which rows come with it.

    Args:
        source: the model; it is loaded for the first row that has to be drawn.
        digest: of the model, for the files.
        out: folder of the files.
        max_batch: places of the network.
        threads: of the CPU.
    """

    def __init__(self, source: Source, digest: str, out: Path, max_batch: int, threads: int):
        self.source, self.digest, self.out, self.max_batch, self.threads = source, digest, out, max_batch, threads
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> Columns:
        """Make the files of some rows; what is returned says of each what became of it."""
        rows = [Row(str(name), int(seed), json.loads(options)) for name, seed, options
                in zip(batch["name"], batch["seed"], batch["options"], strict=True)]  # fmt: skip
        missing = [row for row in rows if not is_made(self._file(row), self._facts(row))]
        failed = self._draw(missing) if missing else {}
        drawn = {row.name for row in missing} - failed.keys()
        outcome = [FAILED if row.name in failed else DRAWN if row.name in drawn else KEPT for row in rows]
        return {"name": [row.name for row in rows], "outcome": outcome, "error": [failed.get(r.name, "") for r in rows]}

    def _draw(self, rows: list[Row]) -> dict[str, str]:
        """Make files; for rows that cannot be drawn, why not."""
        if self._engine is None:
            pipeline = self.source.load(self.threads)
            self._engine = Engine(pipeline, max_batch=self.max_batch, max_queue=2**31)
        tickets: dict[str, Ticket] = {}
        failed = {}
        for row in rows:
            try:
                tickets[row.name] = self._engine.submit(seed=row.seed, **row.options)
            except FastdiffError as error:
                failed[row.name] = str(error)
        for row in rows:
            try:
                if row.name in tickets:
                    (image,) = self._engine.images(tickets[row.name].result(), "pil")
                    save_png(image, self._file(row), self._facts(row))
            except FastdiffError as error:
                failed[row.name] = str(error)
        return failed

    def _file(self, row: Row) -> Path:
        return self.out / f"{row.name}.png"

    def _facts(self, row: Row) -> dict[str, str]:
        return {"row": row.facts(), "model": self.digest, "software": "fastdiff"}
