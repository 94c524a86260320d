"""Offline generation with Ray Data: a table in, a folder of pictures out, exactly one for each row."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.errors import BackendError
from fastdiff.images import parts_of
from fastdiff.serve.ray.cluster import Scale, Share, check, fit, last_line
from fastdiff.serve.ray.painter import DRAWN, FAILED, KEPT, Painter
from fastdiff.serve.ray.source import Source
from fastdiff.serve.ray.table import Row

ROWS = 8  # in a task for each place of the network: few are lost with a worker, and its batch stays full
TRIES = 3  # to start a worker that dies


class Offline(NamedTuple):
    """What came of a run."""

    drawn: int
    kept: int  # were there already
    failed: dict[str, str]  # name of a row: why it cannot be drawn


def draw(
    source: Source,
    rows: Sequence[Row],
    out: Path,
    scale: Scale,
    max_batch: int = 8,
    progress: Callable[[int], object] = lambda count: None,
) -> Offline:
    """Draw what is missing of a table, on the cluster that this process is connected to.

    A file is written under another name and then renamed, so that it is whole or not there. A row whose file is whole,
    and says that it was made from the same row by the same model, is left alone: whatever was killed, running the same
    again completes the folder, with the same bits. A worker that dies is replaced, and its rows are given out again.

    Args:
        source: the model.
        rows: of the table.
        out: folder; with several machines, one that all of them see.
        scale: how many workers, and what each takes.
        max_batch: places of the network in one evaluation.
        progress: called with the number of rows that were just finished.

    Raises:
        BackendError: if no worker can be started, or Ray gives up.
        PlanError: if not even the least number of workers fits.
    """
    check(scale)
    source, share = source.located(), fit(scale)
    out.mkdir(parents=True, exist_ok=True)
    painter = {"source": source, "digest": source.digest(), "out": out.resolve(), "max_batch": max_batch,
               "threads": share.cores}  # fmt: skip
    counts = Counter[str]()
    failed: dict[str, str] = {}
    for found in _run(rows, painter, share, ROWS * max_batch):
        counts.update(found["outcome"])
        failed |= {name: why for name, why in zip(found["name"], found["error"], strict=True) if why}
        progress(len(found["name"]))
    for part in parts_of(out):
        part.unlink(missing_ok=True)
    assert counts[FAILED] == len(failed) and counts.total() == len(rows)
    return Offline(counts[DRAWN], counts[KEPT], failed)


def _run(rows: Sequence[Row], painter: dict[str, Any], share: Share, most: int) -> Iterator[dict[str, list[str]]]:
    """What became of each row, as tasks end."""
    import pyarrow
    import ray
    import ray.data

    size = max(1, min(most, -(-len(rows) // share.most)))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    tables = [
        pyarrow.table({"name": [row.name for row in part], "seed": [row.seed for row in part],
                       "options": [json.dumps(row.options) for row in part]})
        for part in parts
    ]  # fmt: skip
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.max_consecutive_actor_init_deaths = False, TRIES
    logging.getLogger("ray.data").setLevel("ERROR")
    pool = ray.data.ActorPoolStrategy(min_size=share.least, max_size=max(share.least, min(share.most, len(parts))))
    made = ray.data.from_arrow(tables).map_batches(
        Painter, batch_size=None, compute=pool, fn_constructor_kwargs=painter, **share.options()
    )
    try:
        for table in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield table.to_pydict()
    except ray.exceptions.RayError as error:
        raise BackendError(f"the run ended early: {last_line(error)}") from error
