"""Attention by whoever was measured to be fastest: our Triton kernel or one of torch's, by a table of data.

The choice depends on chip, lengths, head size and dtype, never on the batch: an image keeps its bits in any company.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import PlanError

from .attention import LARGEST_HEAD, MOST_KEYS_OF_TEXT, SMALLEST_HEAD
from .attention import attention as triton_attention
from .choices import ATTENTION, Table

LENGTHS = ((2048, "1k"), (8192, "4k"))  # fewer queries than this: that class; the rest is "16k"
DEFAULT = "sdpa"


class Choice(NamedTuple):
    """Who computes one attention, and why."""

    by: str
    why: str


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return result


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
    return result


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return result


# Torch's backends are called by their own names: its switch between them is global, and this process is not ours.
CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "triton": triton_attention, "sdpa": _sdpa, "flash": _flash, "efficient": _efficient, "cudnn": _cudnn
}  # fmt: skip


def shape_class(L: int, M: int, d: int) -> str:
    """The shape class of ``L`` queries, ``M`` keys and head size ``d``: ``"4k_40"``, ``"cross_64"``."""
    if M <= MOST_KEYS_OF_TEXT:
        return f"cross_{d}"
    return f"{next((name for limit, name in LENGTHS if limit > L), '16k')}_{d}"


def choose(L: int, M: int, d: int, dtype: torch.dtype, architecture: int, table: Table = ATTENTION) -> Choice:
    """Return who computes attention of these sizes on a chip, and why.

    Args:
        L: queries.
        M: keys.
        d: head size.
        dtype: of all.
        architecture: compute capability times ten, 90 for 9.0; 0 where there is no GPU.
        table: rows like those of ``kernels/choices.py``.

    Raises:
        PlanError: if a row names an implementation that there is not.
    """
    kind = shape_class(L, M, d)
    row = table.get((architecture, kind, "float" if dtype == torch.float32 else "half"))
    if row is None:
        return Choice(DEFAULT, f"no measurement for {kind} in {dtype} on compute capability {architecture / 10}")
    by, why = row
    if by not in CANDIDATES:
        raise PlanError(f"attention {kind}: table names {by!r}; allowed: {', '.join(CANDIDATES)}")
    if by == "triton" and not SMALLEST_HEAD <= d <= LARGEST_HEAD:
        return Choice(DEFAULT, f"our kernel takes head sizes {SMALLEST_HEAD} to {LARGEST_HEAD}, not {d}")
    return Choice(by, why)


def architecture_of(tensor: Tensor) -> int:
    """Compute capability times ten of the GPU that holds a tensor; 0 where it is on none."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def attention_from(table: Table) -> Callable[..., Tensor]:
    """Return attention that chooses by a table; same signature as ``attention``."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor | None = None) -> Tensor:
        choice = choose(q.shape[2], k.shape[2], q.shape[3], q.dtype, architecture_of(q), table)
        options: dict[str, Any] = {"out": out} if choice.by == "triton" else {}
        result = CANDIDATES[choice.by](q, k, v, **options)
        return result if out is None or result is out else out.copy_(result)

    return attention


attention = attention_from(ATTENTION)
"""Softmax attention by the shipped table; see ``reference.attention``. ``out``: written and returned."""
