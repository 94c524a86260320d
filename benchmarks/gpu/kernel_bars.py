"""From the JSON of the kernel parts to the bars that kernels have to meet, and to rows of the table of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastdiff.benchmarks.bars import Bar, at_least, at_most, not_measured
from fastdiff.benchmarks.gpu.common import INTERPRETER, failed
from fastdiff.benchmarks.gpu.kernels_speed import BACKENDS, EAGER, OURS
from fastdiff.kernels.choices import ATTENTION, Table
from fastdiff.kernels.dispatch import choose, shape_class

LARGE, SMALL = 64e6, 2e6  # bytes of a tensor
WIDTHS = (40, 80, 160)
SDPA = (EAGER, *BACKENDS)  # torch's own choice, and each of its backends
Entry = dict[str, Any]
Part = dict[str, Any] | None  # of a part that did not run: None


def entries(part: Part, op: str, **label: str) -> list[Entry]:
    """What a part measured of an op, right entries alone."""
    found = [entry for entry in (part or {}).get("entries", []) if entry["op"] == op and not failed(entry)]
    return [entry for entry in found if all(entry[key] == value for key, value in label.items())]


def correct(part: Part) -> Iterator[Bar]:
    """Part (a): every kernel against its twin, in the interpreter and on a GPU."""
    for wanted in ("the interpreter", "a GPU"):
        name = f"kernels against float64 on {wanted}: entries out of tolerance"
        here = part is not None and (part["device"] == INTERPRETER) == (wanted == "the interpreter")
        if part is None or not here or not part["entries"]:
            yield not_measured(name, "<= 0")
        else:
            missing = len(part["not_run"]) + (part["status"] != "done")
            yield at_most(name, sum(failed(entry) for entry in part["entries"]) + missing, 0)


def norms(part: Part) -> Iterator[Bar]:
    """Group norm: large tensors near copy speed, small ones in one short launch."""
    found = entries(part, "group_norm_silu", by=OURS)
    large = [entry["share_of_copy_rate"] for entry in found if entry["bytes"] / 2 > LARGE]
    small = [entry for entry in found if entry["bytes"] / 2 < SMALL]
    name = "group norm + SiLU above 64 MB: least share of copy speed"
    yield at_least(name, min(large), 0.85) if large else not_measured(name, ">= 0.85")
    for what, bound, values in (
        ("launches", 1, [entry["launches"] for entry in small]),
        ("microseconds", 4, [1000 * entry["median_ms"] for entry in small]),
    ):
        name = f"group norm + SiLU below 2 MB: most {what}"
        yield at_most(name, max(values), bound) if values else not_measured(name, f"<= {bound}")


def by_shape(part: Part) -> dict[tuple[str, str], dict[str, Entry]]:
    """Attention, shape and dtype -> who -> entry, where ours and torch's own choice were both measured."""
    found: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries(part, "attention"):
        if not entry["shape"].startswith("tiny"):
            found.setdefault((entry["shape"], entry["dtype"]), {})[entry["by"]] = entry
    return {key: who for key, who in found.items() if {OURS, EAGER} <= who.keys()}


def fastest(who: dict[str, Entry]) -> float:
    """Milliseconds of the fastest of torch's backends."""
    return min(who[name]["median_ms"] for name in SDPA if name in who)


def chosen(part: dict[str, Any], who: dict[str, Entry], dtype: str, table: Table) -> str:
    """Who computes a shape by the table, as entries name them."""
    L, M, d = who[OURS]["sizes"]
    by = choose(L, M, d, dtype_of(dtype), architecture(part), table).by
    return EAGER if by == "sdpa" else by


def dtype_of(name: str) -> torch.dtype:
    """``"torch.float16"`` -> ``torch.float16``."""
    found = getattr(torch, name.removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found


def architecture(part: dict[str, Any]) -> int:
    """Compute capability times ten of the GPU that a part ran on."""
    major, minor = part["environment"]["gpu"]["compute_capability"].split(".")
    return 10 * int(major) + int(minor)


def attention(part: Part, table: Table = ATTENTION) -> Iterator[Bar]:
    """Attention: what is dispatched never behind torch, ours ahead of FlashAttention-2 and, over text, of SDPA."""
    shapes = by_shape(part)
    name = "attention by the table: least speed over the fastest of SDPA's backends"
    used = {key: chosen(part or {}, who, key[1], table) for key, who in shapes.items()}
    ratios = [fastest(who) / who[used[key]]["median_ms"] for key, who in shapes.items() if used[key] in who]
    whole = len(ratios) == len(shapes) > 0
    yield at_least(name, min(ratios), 1.0) if whole else not_measured(name, ">= 1")
    for width in WIDTHS:
        name = f"attention d = {width}: least speed over SDPA's FlashAttention-2"
        both = [who for key, who in shapes.items() if key[0].endswith(f" d{width}") and key[0].startswith("self")]
        ratios = [who["flash"]["median_ms"] / who[OURS]["median_ms"] for who in both if "flash" in who]
        yield at_least(name, min(ratios), 1.2) if ratios else not_measured(name, ">= 1.2")
    name = "cross-attention over 77 keys: most time over SDPA's"
    ratios = [
        who[OURS]["median_ms"] / who[EAGER]["median_ms"] for key, who in shapes.items() if key[0].startswith("cross")
    ]
    yield at_most(name, max(ratios), 0.67) if ratios else not_measured(name, "<= 0.67")
    name = "attention: shapes for which our kernel is chosen"
    count = sum(by == OURS for by in used.values())
    yield Bar(name, f"{count} of {len(used)}", "reported", True) if used else not_measured(name, "reported")


def kernel_bars(check: Part, speed: Part) -> Iterator[Bar]:
    """Every bar of the kernels, from the JSON of ``kernels_check`` and ``kernels_speed``; None: it did not run."""
    yield from correct(check)
    yield from norms(speed)
    yield from attention(speed)


def table(part: dict[str, Any]) -> Table:
    """Rows for ``kernels/choices.py``: of each shape class whoever is least behind at its worst, with the figures."""
    classes: dict[tuple[int, str, str], list[dict[str, Entry]]] = {}
    for who in by_shape(part).values():
        key = (architecture(part), shape_class(*who[OURS]["sizes"]), "half")
        classes.setdefault(key, []).append(who)
    found: Table = {}
    for key, measured in classes.items():
        names = set.intersection(*(set(who) & {OURS, EAGER, *BACKENDS[:-1]} for who in measured))
        behind = {name: max(who[name]["median_ms"] / fastest(who) for who in measured) for name in names}
        best = min(behind, key=lambda name: behind[name])
        if best != EAGER:
            found[key] = (best, f"{behind[best]:.3f} of the fastest SDPA backend's time, {len(measured)} measurements")
    return found
