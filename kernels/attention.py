# Softmax attention, forward, self and cross.
#
# Shapes   q, out [N, heads, L, d], k, v [N, heads, M, d], any strides, fp32, fp16 or bf16; d from 16 to 160.
# Grid     (ceil(L / BLOCK_L) * N * heads): neighbours share a head, so its keys and values stay in L2.
# Heads    d is covered by LOW + HIGH lanes, each a power of 2 (40 = 32 + 16, 80 = 64 + 16, 160 = 128 + 32),
#          so that the head sizes of the field pay 48, 80 and 160 lanes of matrix product, not 64, 128 and
#          256. HIGH may be 0.
# Passes   online softmax in float32 over BLOCK_M keys at a time. With M <= 128 (text) and half precision all
#          keys lie in one tile, no loop; float32 keeps the loop, since exact products of 128 keys do not fit
#          the registers.
# Work     4 * N*heads*L*M*d flop; time >= that / peak, and >= bytes / bandwidth with 2 * N*heads*(L + M)*d *
#          itemsize.
# Limits   no mask, no dropout, no backward; no atomics. float32 products are exact float32 (no TF32), and
#          slow.
# Twin     reference.attention
"""Softmax attention in Triton. The specification is ``fastdiff.kernels.reference.attention``."""

from __future__ import annotations

from math import e, gcd, log2, sqrt
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import ShapeError

from .attention_tiles import AttentionTile
from .edge import DTYPES, check_like, chip_of
from .tiles import Chip, lookup

SMALLEST_HEAD, LARGEST_HEAD = 16, 160
MOST_KEYS_OF_TEXT = 128
MANY_QUERIES = 1024  # from here on one head of one image has work for several large tiles


@triton.jit
def _load(
    base, rows, limit, row_stride, lane_stride,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Lanes FIRST.. of some rows: [rows, WIDTH], 0 beyond the last row (FULL: there is none) and the last lane."""
    lanes = FIRST + tl.arange(0, WIDTH)
    place = base + rows[:, None] * row_stride + lanes[None, :] * lane_stride
    if FULL and FIRST + WIDTH <= HEAD:
        return tl.load(place)
    elif FULL:
        return tl.load(place, mask=(lanes < HEAD)[None, :], other=0.0)
    else:
        return tl.load(place, mask=(rows < limit)[:, None] & (lanes < HEAD)[None, :], other=0.0)


@triton.jit
def _store(base, rows, limit, row_stride, lane_stride, values, FIRST: tl.constexpr, HEAD: tl.constexpr):
    lanes = FIRST + tl.arange(0, values.shape[1])
    inside = (rows < limit)[:, None] & (lanes < HEAD)[None, :]
    place = base + rows[:, None] * row_stride + lanes[None, :] * lane_stride
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _scores(
    q_low, q_high, k, keys, M, k_m, k_d,
    HEAD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_L, BLOCK_M] float32: the products of queries and keys, -inf beyond the last key."""
    k_low = _load(k, keys, M, k_m, k_d, 0, LOW, HEAD, FULL)
    scores = _dot(q_low, tl.trans(k_low), tl.zeros([q_low.shape[0], k_low.shape[0]], tl.float32), PRECISION)
    if HIGH > 0:
        k_high = _load(k, keys, M, k_m, k_d, LOW, HIGH, HEAD, FULL)
        scores = _dot(q_high, tl.trans(k_high), scores, PRECISION)
    if not FULL:
        scores = tl.where((keys < M)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _mix(
    weights, sum_low, sum_high, v, keys, M, v_m, v_d,
    HEAD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the values of some keys, by their weights."""
    weights = weights.to(v.dtype.element_ty)
    sum_low = _dot(weights, _load(v, keys, M, v_m, v_d, 0, LOW, HEAD, FULL), sum_low, PRECISION)
    if HIGH > 0:
        sum_high = _dot(weights, _load(v, keys, M, v_m, v_d, LOW, HIGH, HEAD, FULL), sum_high, PRECISION)
    return sum_low, sum_high


@triton.jit
def _step(
    peak, total, sum_low, sum_high, q_low, q_high, k, v, keys, M, scale, k_m, k_d, v_m, v_d,
    HEAD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax: take one more tile of keys in. `scale` is applied with the maximum, in one operation."""
    scores = _scores(q_low, q_high, k, keys, M, k_m, k_d, HEAD, LOW, HIGH, FULL, PRECISION)
    higher = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    decay = tl.exp2(peak - higher)
    weights = tl.exp2(scores * scale - higher[:, None])
    total = total * decay + tl.sum(weights, axis=1)
    sum_low = sum_low * decay[:, None]
    if HIGH > 0:
        sum_high = sum_high * decay[:, None]
    sum_low, sum_high = _mix(weights, sum_low, sum_high, v, keys, M, v_m, v_d, HEAD, LOW, HIGH, FULL, PRECISION)
    return higher, total, sum_low, sum_high


@triton.jit
def _attention_kernel(
    q, k, v, out, L, M, heads, scale,
    q_n, q_h, q_l, q_d, k_n, k_h, k_m, k_d, v_n, v_h, v_m, v_d, o_n, o_h, o_l, o_d,
    HEAD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_TILE: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # All strides but those of the lanes come divided by UNIT: so the compiler knows that 40 or 200 is a
    # multiple of 8 and loads 16 bytes at a time. By itself it looks for multiples of 16 only.
    blocks = tl.cdiv(L, BLOCK_L)
    place = tl.program_id(0) // blocks
    image, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    q += (image * q_n + head * q_h) * UNIT
    k += (image * k_n + head * k_h) * UNIT
    v += (image * v_n + head * v_h) * UNIT
    out += (image * o_n + head * o_h) * UNIT

    q_l, k_m, v_m, o_l = q_l * UNIT, k_m * UNIT, v_m * UNIT, o_l * UNIT

    rows = (tl.program_id(0) % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    q_low = _load(q, rows, L, q_l, q_d, 0, LOW, HEAD, False)
    q_high, sum_low = q_low, tl.zeros([BLOCK_L, LOW], tl.float32)
    sum_high = sum_low
    if HIGH > 0:
        q_high = _load(q, rows, L, q_l, q_d, LOW, HIGH, HEAD, False)
        sum_high = tl.zeros([BLOCK_L, HIGH], tl.float32)

    if ONE_TILE:
        keys = tl.arange(0, BLOCK_M)
        scores = _scores(q_low, q_high, k, keys, M, k_m, k_d, HEAD, LOW, HIGH, not RAGGED, PRECISION)
        weights = tl.exp2(scores * scale - tl.max(scores, axis=1)[:, None] * scale)
        total = tl.sum(weights, axis=1)
        sum_low, sum_high = _mix(
            weights, sum_low, sum_high, v, keys, M, v_m, v_d, HEAD, LOW, HIGH, not RAGGED, PRECISION
        )
    else:
        peak = tl.full([BLOCK_L], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_L], tl.float32)
        # The last tile of keys stands apart, so that the others need no mask; exact float32 products would then spill.
        APART: tl.constexpr = RAGGED and PRECISION == "tf32"
        even = M - M % BLOCK_M if APART else M
        for start in range(0, even, BLOCK_M):
            keys = start + tl.arange(0, BLOCK_M)
            peak, total, sum_low, sum_high = _step(
                peak, total, sum_low, sum_high, q_low, q_high, k, v, keys, M, scale, k_m, k_d, v_m, v_d,
                HEAD, LOW, HIGH, APART or not RAGGED, PRECISION,
            )  # fmt: skip
        if APART:
            keys = even + tl.arange(0, BLOCK_M)
            peak, total, sum_low, sum_high = _step(
                peak, total, sum_low, sum_high, q_low, q_high, k, v, keys, M, scale, k_m, k_d, v_m, v_d,
                HEAD, LOW, HIGH, False, PRECISION,
            )  # fmt: skip

    _store(out, rows, L, o_l, o_d, sum_low / total[:, None], 0, HEAD)
    if HIGH > 0:
        _store(out, rows, L, o_l, o_d, sum_high / total[:, None], LOW, HEAD)


INTERPRETED = not isinstance(_attention_kernel, triton.JITFunction)


class Plan(NamedTuple):
    """How one head is cut."""

    constants: dict[str, int | bool | str]
    warps: int
    stages: int


def plan(L: int, M: int, d: int, dtype: torch.dtype, chip: Chip) -> Plan:
    """Cut one head for a chip. The batch is not an argument: an image's bits must not depend on it."""
    padded = triton.next_power_of_2(d)
    low = padded if padded == d else padded // 2
    high = 0 if padded == d else max(16, triton.next_power_of_2(d - low))
    if low + high == padded:
        low, high = padded, 0
    kind = "cross" if M <= MOST_KEYS_OF_TEXT else "many" if L >= MANY_QUERIES else "few"
    shape = f"{kind}_{max(64, padded)}"
    tile = cast(AttentionTile, lookup("attention", shape, dtype, chip.architecture))
    one_tile = tile.keys == 0
    keys = max(16, triton.next_power_of_2(M)) if one_tile else tile.keys
    queries = min(tile.queries, max(16, triton.next_power_of_2(L)))
    constants: dict[str, int | bool | str] = {
        "HEAD": d, "LOW": low, "HIGH": high, "BLOCK_L": queries, "BLOCK_M": keys, "ONE_TILE": one_tile,
        "RAGGED": M % keys != 0, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return Plan(constants, tile.warps, tile.stages)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.dtype not in DTYPES or tensor.dtype != q.dtype:
            received = f"{tuple(tensor.shape)} {tensor.dtype}"
            allowed = f"[N, heads, length, d], all in one dtype of {', '.join(map(str, DTYPES))}"
            raise ShapeError(f"attention: {name} {received}; allowed: {allowed}")
    N, heads, _, d = q.shape
    if not SMALLEST_HEAD <= d <= LARGEST_HEAD:
        raise ShapeError(f"attention: head size {d}; allowed: {SMALLEST_HEAD} to {LARGEST_HEAD}")
    expected = (N, heads, k.shape[2], d)
    if tuple(k.shape) != expected or tuple(v.shape) != expected or k.numel() == 0 or q.numel() == 0:
        received = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ShapeError(f"attention: {received}; allowed: not empty, k and v ({N}, {heads}, M, {d}) each")


def attention(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Softmax attention, self or cross.

    Args:
        q: ``[N, heads, L, d]``, not empty, any strides (a view of a packed projection), ``16 <= d <= 160``.
        k: ``[N, heads, M, d]``, any strides, ``M >= 1``.
        v: ``[N, heads, M, d]``, any strides.
        out: ``[N, heads, L, d]`` in the dtype of ``q``, any strides, or None; written and returned.

    Returns:
        ``[N, heads, L, d]`` in the dtype and, where it is dense, the layout of ``q``:
        ``softmax(q k^T / sqrt(d)) v``.

    Raises:
        ShapeError: if a shape or dtype does not fit.
        BackendError: if the device cannot run Triton, or an input requires grad.

    Source: Dao 2023, arXiv:2307.08691, algorithm 1, forward only.
    """
    _check(q, k, v)
    check_like("attention", "out", out, q)
    chip = chip_of("attention", (q, k, v) if out is None else (q, k, v, out), interpreted=INTERPRETED)
    out = torch.empty_like(q) if out is None else out
    N, heads, L, d = q.shape
    M = k.shape[2]
    cut = plan(L, M, d, q.dtype, chip)
    if INTERPRETED and q.dtype == torch.bfloat16:
        # The interpreter's dot takes bfloat16 for integers. Its products are exact in float32.
        cut.constants["PRECISION"] = "widened"
    blocks = triton.cdiv(L, cast(int, cut.constants["BLOCK_L"]))
    all_strides = [tensor.stride() for tensor in (q, k, v, out)]
    unit = gcd(8, *(stride for strides in all_strides for stride in strides[:3]))
    strides = [stride for n, h, row, lane in all_strides for stride in (n // unit, h // unit, row // unit, lane)]
    with torch.cuda.device_of(q):
        _attention_kernel[(blocks * N * heads,)](
            q, k, v, out, L, M, heads, log2(e) / sqrt(d), *strides,
            **cut.constants, UNIT=unit, num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out
