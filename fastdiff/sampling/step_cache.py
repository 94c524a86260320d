"""Step caching: deep features of the network, kept at some steps and read at the next ones. Lossy, off by default.

Deep features change little from one step to the next. So at every ``interval``-th evaluation the whole network runs and
what joins a skip connection from below is kept; at the others only the layers above that connection run. Which rows do
which is decided here, before the walk, and stands in the table's structure: a captured loop holds both kinds of rows.
The features are a part of the walk's state: nothing is kept between calls.

Source: Ma et al. 2023, DeepCache, arXiv:2312.00858, sec. 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastdiff.errors import PlanError
from fastdiff.sampling.denoiser import Caching
from fastdiff.sampling.table import Deep, RowPlan, StepTable


def planned(table: StepTable, network: object, interval: int, branch: int) -> StepTable:
    """Return a table whose rows say when the network's deep layers are left out.

    Args:
        table: a sampler.
        network: what is to run.
        interval: run the whole network at every so many evaluations; 1: always.
        branch: number of the skip connection to cut at. 0, the shallowest, leaves only what joins the first
            convolution; higher numbers leave more layers to run, and are more accurate.

    Raises:
        PlanError: if a number is out of range, or the network cannot leave anything out.
    """
    for name, value, least in (("cache_interval", interval, 1), ("cache_branch_id", branch, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(f"{name} is {value!r}; allowed: whole numbers from {least}")
    if not isinstance(network, Caching):
        raise PlanError(
            f"cache_interval is {interval}, but {type(network).__name__} cannot leave out its deep layers; allowed: a "
            "UNet that runs in torch or in a plan of this library, without ControlNet"
        )
    if branch >= network.branches:
        raise PlanError(f"cache_branch_id is {branch}; allowed for this network: 0 to {network.branches - 1}")
    rows = _rows(table.structure.rows, interval, branch)
    return dataclasses.replace(table, structure=table.structure._replace(rows=rows))


def _rows(rows: Sequence[RowPlan], interval: int, branch: int) -> tuple[RowPlan, ...]:
    asked = [i for i, row in enumerate(rows) if row.asks]
    reads, age, wide = {}, interval, False  # evaluations since the last whole one; did that hold the weak half too?
    for i in asked:
        guided = rows[i].guided is not None
        reads[i] = age < interval and (wide or not guided)
        age = age + 1 if reads[i] else 1
        wide = wide if reads[i] else guided
    planned = list(rows)
    for i, after in zip(asked, [*asked[1:], None], strict=True):
        if reads[i] or (after is not None and reads[after]):
            planned[i] = rows[i]._replace(deep=Deep(branch, reads[i]))
    return tuple(planned)
