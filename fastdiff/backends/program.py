"""A list of ops under construction: values, the slots that hold them, and where each lies in one block of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.native import ADD, ATTENTION, CONV, LAYER_NORM, NORM, RESAMPLE, SLOTS, Op


class Value(NamedTuple):
    """Channels-last features of a batch: ``[B, H, W, C]``, ``ld`` floats from one pixel to the next."""

    slot: int
    height: int
    width: int
    channels: int
    ld: int


class Weight(NamedTuple):
    """A layer's weights: the parameters, which ``matrix`` joins to ``[N, K]`` with K as (row, column, channel)."""

    parts: tuple[Tensor, ...]

    def matrix(self) -> Tensor:
        """``[N, K]``: a view of the parameter where there is only one and its layout allows, else a copy."""
        rows = [(p.permute(0, 2, 3, 1) if p.dim() == 4 else p).flatten(1) for p in self.parts]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).detach().contiguous()

    def tensor(self) -> Tensor:
        """As torch's own calls take it: a kernel ``[N, C, 3, 3]`` as it is, products joined to ``[N, C]``."""
        first = self.parts[0]
        if first.dim() == 4 and first.shape[2] > 1:
            return first.detach()
        rows = [p.flatten(1) for p in self.parts]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).detach()


@dataclass
class Program:
    """Ops and slots. A slot is an external tensor's, a weight's, or a part of the arena."""

    batch: int
    ops: list[Op] = field(default_factory=list)
    slots: int = 0
    weights: dict[int, Weight] = field(default_factory=dict)
    vectors: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # biases and norms' weights, joined
    external: dict[str, int] = field(default_factory=dict)
    floats: dict[int, int] = field(default_factory=dict)  # arena slots and their sizes
    alias: dict[int, tuple[int, int]] = field(default_factory=dict)  # slot -> (slot, floats behind its start)
    cut: int | None = None  # the op before which layers are left out
    results: dict[str, Value] = field(default_factory=dict)  # values to hand out beside ``out``

    def slot(self) -> int:
        """A new slot."""
        self.slots += 1
        return self.slots - 1

    def given(self, name: str) -> int:
        """The slot of a tensor that each call brings."""
        if name not in self.external:
            self.external[name] = self.slot()
        return self.external[name]

    def behind(self, slot: int, floats: int) -> int:
        """A slot that starts so many floats into another."""
        new = self.slot()
        self.alias[new] = (slot, floats)
        return new

    def hand_out(self) -> None:
        """Let every value of ``results`` lie in a tensor of its name that each call brings."""
        for name, value in self.results.items():
            self.alias[value.slot] = (self.given(name), 0)

    def vector(self, *parts: Tensor | None) -> int:
        """The slot of a bias or a norm's weights; -1 for None."""
        if parts[0] is None:
            return -1
        new = self.slot()
        self.vectors[new] = tuple(part for part in parts if part is not None)
        return new

    def value(self, height: int, width: int, channels: int) -> Value:
        """A new value in the arena."""
        new = self.slot()
        self.floats[new] = self.batch * height * width * channels
        return Value(new, height, width, channels, channels)

    def part(self, value: Value, start: int, channels: int) -> Value:
        """Some channels of a value."""
        return value._replace(slot=self.behind(value.slot, start), channels=channels)

    def _sources(self, sources: Sequence[Value]) -> dict[str, int]:
        first, second = sources[0], sources[1] if len(sources) > 1 else None
        return {
            "B": self.batch, "SH": first.height, "SW": first.width, "src0": first.slot, "C0": first.channels,
            "ld0": first.ld, "src1": second.slot if second else -1, "C1": second.channels if second else 0,
            "ld1": second.ld if second else 0,
        }  # fmt: skip

    def norm(
        self,
        sources: Sequence[Value],
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        row: tuple[int, int] = (-1, 0),
    ) -> int:
        """The slot of a group norm's scales and shifts; ``row`` (slot, stride) modulates them."""
        out = self.slot()
        self.floats[out] = self.batch * 2 * sum(s.channels for s in sources)
        self.ops.append(
            Op(
                kind=NORM, **self._sources(sources), H=sources[0].height, W=sources[0].width, groups=groups, eps=eps,
                weight=self.vector(weight), bias=self.vector(bias), row=row[0], row_stride=row[1], out=out,
            )
        )  # fmt: skip
        return out

    def conv(
        self,
        sources: Sequence[Value],
        weights: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        *,
        kernel: int = 1,
        stride: int = 1,
        pad: int | None = None,
        size: tuple[int, int] | None = None,
        stats: int = -1,
        silu: bool = False,
        gated: bool = False,
        row: tuple[int, int] = (-1, 0),
        residual: Value | None = None,
        out: Value | None = None,
    ) -> Value:
        """A convolution or linear layer. ``size``: what its source is enlarged to first; ``pad`` None: as much as fits.

        With ``pad`` 0 and ``stride`` 2 the image gets one more row and column of zeros at its end, as in DDPM.
        """
        view = size or (sources[0].height, sources[0].width)
        if pad is None:
            pad = kernel // 2
        height, width = ((extent + (2 * pad if pad else kernel // 2) - kernel) // stride + 1 for extent in view)
        channels = sum(w.shape[0] for w in weights) // (2 if gated else 1)
        result = out or self.value(height, width, channels)
        slot = self.slot()
        self.weights[slot] = Weight(tuple(weights))
        self.ops.append(
            Op(
                kind=CONV, **self._sources(sources), H=height, W=width, VIEW_H=view[0], VIEW_W=view[1], N=channels,
                ldo=result.ld, ldr=residual.ld if residual else 0, kernel=kernel, stride=stride, pad=pad, silu=silu,
                gated=gated, affine=stats >= 0, stats=stats, row=row[0], row_stride=row[1], weight=slot,
                bias=self.vector(*bias), residual=residual.slot if residual else -1, out=result.slot,
            )
        )  # fmt: skip
        return result

    def layer_norm(self, x: Value, weight: Tensor, bias: Tensor, eps: float) -> Value:
        """Layer normalisation of every pixel."""
        out = self.value(x.height, x.width, x.channels)
        self.ops.append(
            Op(
                kind=LAYER_NORM, **self._sources([x]), H=x.height, W=x.width, ldo=out.ld, eps=eps,
                weight=self.vector(weight), bias=self.vector(bias), out=out.slot,
            )
        )  # fmt: skip
        return out

    def attention(
        self, q: Value, keys: int, values: int, count: int, heads: int, strides: tuple[int, int, int]
    ) -> Value:
        """Attention of ``q``'s pixels to ``count`` keys; ``strides``: to the next image's, head's and key's."""
        out = self.value(q.height, q.width, q.channels)
        self.ops.append(
            Op(
                kind=ATTENTION, B=self.batch, H=q.height, W=q.width, N=q.channels, heads=heads, L=q.height * q.width,
                M=count, src0=q.slot, ld0=q.ld, src1=keys, weight=values, ldo=out.ld, out=out.slot, batch_k=strides[0],
                head_k=strides[1], ldk=strides[2],
            )
        )  # fmt: skip
        return out

    def resample(self, sources: Sequence[Value], height: int, width: int, stats: int = -1, silu: bool = False) -> Value:
        """Sources side by side, normalised and activated; halved, repeated or neither."""
        out = self.value(height, width, sum(s.channels for s in sources))
        self.ops.append(
            Op(
                kind=RESAMPLE, **self._sources(sources), H=height, W=width, ldo=out.ld, affine=stats >= 0, stats=stats,
                silu=silu, out=out.slot,
            )
        )  # fmt: skip
        return out

    def add(self, x: Value, more: Value) -> Value:
        """The sum of two values."""
        out = self.value(x.height, x.width, x.channels)
        self.ops.append(
            Op(
                kind=ADD, **self._sources([x]), H=x.height, W=x.width, ldo=out.ld, residual=more.slot, ldr=more.ld,
                out=out.slot,
            )
        )  # fmt: skip
        return out

    def layout(self) -> tuple[dict[int, int], int]:
        """Where each arena slot starts, in floats, and the arena's size: what is not alive at once shares memory."""
        spans: dict[int, list[int]] = {}
        for index, op in enumerate(self.ops):
            for name in SLOTS:
                slot, _ = self.resolved(getattr(op, name))
                if slot in self.floats:
                    spans.setdefault(slot, [index, index])[1] = index
        placed: list[tuple[int, int, int, int]] = []  # start, end, first op, last op
        starts: dict[int, int] = {}
        # large ones first: they find the gaps that small ones would break up
        for slot, (begin, end) in sorted(spans.items(), key=lambda item: -self.floats[item[0]]):
            size, at = (self.floats[slot] + 15) // 16 * 16, 0
            for start, stop, first, last in sorted(placed):
                if first <= end and begin <= last:
                    if at + size <= start:
                        break
                    at = max(at, stop)
            starts[slot] = at
            placed.append((at, at + size, begin, end))
        return starts, max((stop for _, stop, _, _ in placed), default=0)

    def resolved(self, slot: int) -> tuple[int, int]:
        """The slot that an alias stands for, and the floats behind its start."""
        offset = 0
        while slot in self.alias:
            slot, more = self.alias[slot]
            offset += more
        return slot, offset
