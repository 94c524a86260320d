"""Every op on the shapes it is judged by: how to make its inputs, how to call it, and what it should give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.benchmarks.environment import relative_error
from fastdiff.kernels import REFERENCE, Ops, Sums

HALF = (torch.float16, torch.bfloat16, torch.float32)
FLOAT = (torch.float32,)  # the registers of the loop are float32 whatever the network computes in
# The bundled network's own sizes, and those of a latent UNet at 512 pixels with guidance.
NORMS = {"tiny": ((1, 16, 32, 32), 8), "real": ((2, 320, 64, 64), 32), "deep": ((2, 1280, 16, 16), 32)}
ATTENTIONS = {"tiny": (1, 2, 64, 64, 32), "real": (2, 8, 4096, 4096, 40), "cross": (2, 8, 4096, 77, 40)}
COMBINES = {"tiny": (1, 1, 32, 32), "real": (2, 4, 64, 64), "wide": (64, 4, 64, 64)}


class Case(NamedTuple):
    """One op on one shape."""

    op: str
    shape: str
    dtypes: tuple[torch.dtype, ...]
    build: Callable[[torch.dtype, torch.device, int], tuple[Any, ...]]  # dtype, device, seed -> arguments
    elements: int  # read and written at least, each once
    flop: int = 0  # of the matrix products

    def bytes(self, dtype: torch.dtype) -> int:
        """The least the memory must move."""
        return self.elements * dtype.itemsize


def norm_case(shape: str) -> Case:
    """Group norm and SiLU with the modulation of a time embedding, channels-last, as the UNet calls it."""
    size, groups = NORMS[shape]
    images, channels = size[:2]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = _draws(dtype, device, seed)
        x = (draw(*size) + 1.0).contiguous(memory_format=torch.channels_last)
        return x, draw(channels), draw(channels), groups, 1e-5, *draw(images, 2 * channels).chunk(2, dim=1)

    return Case("group_norm_silu", shape, HALF, build, 2 * torch.Size(size).numel())


def attention_case(shape: str) -> Case:
    """Self- or cross-attention; ``[N, L, heads, d]`` seen as ``[N, heads, L, d]``, as the UNet calls it."""
    images, heads, queries, keys, width = ATTENTIONS[shape]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = _draws(dtype, device, seed)
        return tuple(draw(images, length, heads, width).transpose(1, 2) for length in (queries, keys, keys))

    elements = 2 * images * heads * (queries + keys) * width
    return Case("attention", shape, HALF, build, elements, 4 * images * heads * queries * keys * width)


def combine_case(shape: str) -> Case:
    """One row of DPM-Solver++(2M): state, estimate and one past estimate in, state and history out."""
    size = COMBINES[shape]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = _draws(dtype, device, seed)
        x, denoised, past = (draw(*size) for _ in range(3))
        return [x, x, denoised, denoised, None, None, past], Sums.of(draw(size[0], 2, 7), [(0, 2, 6), (2,)])

    return Case("combine", shape, FLOAT, build, 5 * torch.Size(size).numel())


def cases() -> list[Case]:
    """Every op on every shape."""
    groups: list[tuple[Callable[[str], Case], dict[str, Any]]] = [
        (norm_case, NORMS), (attention_case, ATTENTIONS), (combine_case, COMBINES)
    ]  # fmt: skip
    return [make(shape) for make, shapes in groups for shape in shapes]


def call(ops: Ops, case: Case, arguments: tuple[Any, ...]) -> Tensor | tuple[Tensor, ...]:
    """Run a case by one implementation."""
    if case.op != "group_norm_silu":
        result: Tensor | tuple[Tensor, ...] = getattr(ops, case.op)(*arguments)
        return result
    *plain, scale, shift = arguments
    return ops.group_norm_silu(*plain, scale=scale, shift=shift)


def truth(case: Case, arguments: tuple[Any, ...]) -> Tensor | tuple[Tensor, ...]:
    """The result of plain torch in float64 on the same inputs."""
    return call(REFERENCE, case, tuple(_double(argument) for argument in arguments))


def error(result: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...]) -> float:
    """Largest error of a result, over the largest exact value."""
    if isinstance(result, Tensor) and isinstance(exact, Tensor):
        return relative_error(result, exact)
    # not max(): it would drop a NaN that does not come first
    return float(torch.tensor([relative_error(a, b) for a, b in zip(result, exact, strict=True)]).max())


def _double(value: Any) -> Any:
    if isinstance(value, list) and value and not isinstance(value[0], tuple):
        return [_double(part) for part in value]
    return value.double() if isinstance(value, Tensor) else value


def _draws(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)  # of the host: the same numbers on every device
    return lambda *size: torch.randn(size, generator=generator).to(device, dtype)
