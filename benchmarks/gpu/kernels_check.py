"""Every kernel against plain torch in float64, on fresh random inputs; the only part that the interpreter can run.

The rule is that of the tests: the largest error may be twice that of plain torch in the same dtype, plus one unit in
the last place of the largest exact value.
"""

from __future__ import annotations

import secrets
from math import floor, log2
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmarks.gpu.cases import Case, call, cases, ours, truth
from fastdiff.benchmarks.gpu.common import DTYPES, Report
from fastdiff.kernels import REFERENCE

FACTOR = 2.0
INTERPRETED = 2e6  # flop and elements of the largest case that the interpreter is given


def judge(found: Tensor, plain: Tensor, exact: Tensor) -> dict[str, Any]:
    """Errors of a kernel and of plain torch, what the rule allows, and whether it holds; NaN never does."""
    largest = exact.abs().max().item()
    ulp = torch.finfo(found.dtype).eps * 2.0 ** floor(log2(largest)) if largest > 0 else 0.0
    error, of_plain = ((value.double() - exact).abs().max().item() for value in (found, plain))
    allowed = FACTOR * of_plain + ulp
    return {"error": error, "error_of_plain_torch": of_plain, "allowed": allowed, "ok": error <= allowed}


def parts(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One result as several, as they are now: a result may be written again."""
    return tuple(value.clone() for value in ((result,) if isinstance(result, Tensor) else result))


def check(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compare one op on one shape, written into memory full of NaN; the seed is fresh and stands in the entry."""
    seed = secrets.randbits(31)
    inputs = case.build(dtype, device, seed)
    plain, exact = parts(call(REFERENCE, case, inputs)), parts(truth(case, inputs))
    if "total" in inputs.options:
        inputs.options["total"].fill_(torch.nan)
    poison = tuple(torch.full_like(value, torch.nan) for value in plain)
    found = parts(call(ours(device), case, inputs, out=poison if case.op == "combine" else poison[0]))
    judged = [judge(*values) for values in zip(found, plain, exact, strict=True)]
    return {"seed": seed, "outputs": judged, "ok": all(one["ok"] for one in judged)}


def part(report: Report, device: torch.device) -> None:
    """Every op, shape and dtype; in the interpreter the small shapes."""
    for case in cases():
        if device.type == "cpu" and case.flop + case.elements > INTERPRETED:
            continue
        for dtype in [dtype for dtype in DTYPES if dtype in case.dtypes]:
            label = {"op": case.op, "shape": case.shape, "dtype": str(dtype)}
            report.add(label, lambda c=case, d=dtype: check(c, d, device))
