"""Every op on the shapes it is judged by: how to make its inputs, how to call it, and what it should give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.benchmarks.environment import relative_error
from fastdiff.kernels import REFERENCE, Ops, Sums, triton_ops

HALF = (torch.float16, torch.bfloat16, torch.float32)
FLOAT = (torch.float32,)
# The bundled network's own sizes; those of latent UNets at 512 and 1024 pixels with guidance; tensors above 64 MB and
# below 2 MB; and a decoder's, which no chip holds.
NORMS = {
    "tiny": ((1, 16, 32, 32), 8), "real": ((2, 320, 64, 64), 32), "deep": ((2, 1280, 16, 16), 32),
    "small": ((2, 1280, 8, 8), 32), "one": ((1, 640, 32, 32), 32), "xl": ((2, 320, 128, 128), 32),
    "large": ((8, 320, 128, 128), 32), "wide": ((8, 960, 64, 64), 32), "decoder": ((1, 128, 512, 512), 32),
}  # fmt: skip
ROWS = {"tiny": (1, 64, 32), "sd": (2, 4096, 320), "xl": (2, 1024, 1280)}  # images, tokens, channels
# images, heads, queries, keys, head size
ATTENTIONS = {
    "tiny": (1, 2, 64, 64, 32), "tiny cross": (1, 2, 64, 77, 40),
    "self 4k d40": (2, 8, 4096, 4096, 40), "self 4k d64": (2, 10, 4096, 4096, 64),
    "self 1k d80": (2, 8, 1024, 1024, 80), "self 1k d160": (2, 8, 1024, 1024, 160),
    "self 9k d40": (2, 8, 9216, 9216, 40), "self 16k d40": (1, 8, 16384, 16384, 40),
    "self 1k d64": (2, 20, 1024, 1024, 64), "self 4k d80": (2, 8, 4096, 4096, 80),
    "self 4k d160": (2, 8, 4096, 4096, 160),
    "cross d40": (2, 8, 4096, 77, 40), "cross d64": (2, 10, 4096, 77, 64),
    "cross d80": (2, 8, 1024, 77, 80), "cross d160": (2, 8, 256, 77, 160),
}  # fmt: skip
COMBINES = {"tiny": (1, 1, 32, 32), "real": (2, 4, 64, 64), "wide": (64, 4, 64, 64)}


class Inputs(NamedTuple):
    """What one call is given."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Case(NamedTuple):
    """One op on one shape."""

    op: str
    shape: str
    dtypes: tuple[torch.dtype, ...]
    build: Callable[[torch.dtype, torch.device, int], Inputs]  # dtype, device, seed
    elements: int  # read and written at least, each once
    flop: int = 0  # of the matrix products
    timed: bool = True
    sizes: tuple[int, ...] = ()  # of attention: queries, keys, head size

    def bytes(self, dtype: torch.dtype) -> int:
        """The least the memory must move."""
        return self.elements * dtype.itemsize


def norm_case(shape: str, summed: bool = False) -> Case:
    """Group norm and SiLU with the modulation of a time embedding, channels-last, as the UNet calls it.

    Args:
        shape: of ``NORMS``.
        summed: instead of a modulation, a residual and a time row are added before, and the sum is kept.
    """
    size, groups = NORMS[shape]
    images, channels = size[:2]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        draw = _draws(dtype, device, seed)
        x, weight, bias = last(draw(*size) + 1.0), draw(channels), draw(channels)
        scale, shift = draw(images, 2 * channels).chunk(2, dim=1)
        options = {"scale": scale, "shift": shift}
        if summed:
            options = {"residual": last(draw(*size)), "row": shift, "total": torch.full_like(x, torch.nan)}
        return Inputs((x, weight, bias, groups, 1e-5), options)

    name = f"{shape} of a sum" if summed else shape
    return Case("group_norm_silu", name, HALF, build, 2 * torch.Size(size).numel(), timed=not summed)


def layer_norm_case(shape: str) -> Case:
    """Layer norm of a transformer's tokens."""
    images, tokens, channels = ROWS[shape]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        draw = _draws(dtype, device, seed)
        return Inputs((draw(images, tokens, channels) + 1.0, draw(channels), draw(channels)), {})

    return Case("layer_norm", shape, HALF, build, 2 * images * tokens * channels)


def geglu_case(shape: str) -> Case:
    """The gate of a transformer's feed-forward network, on the projection of four times the channels, twice."""
    images, tokens, channels = ROWS[shape]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        return Inputs((_draws(dtype, device, seed)(images, tokens, 8 * channels),), {})

    return Case("geglu", shape, HALF, build, 12 * images * tokens * channels)


def attention_case(shape: str) -> Case:
    """Self- or cross-attention; ``[N, L, heads, d]`` seen as ``[N, heads, L, d]``, as the UNet calls it."""
    images, heads, queries, keys, width = ATTENTIONS[shape]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        draw = _draws(dtype, device, seed)
        return Inputs(tuple(draw(images, n, heads, width).transpose(1, 2) for n in (queries, keys, keys)), {})

    elements = 2 * images * heads * (queries + keys) * width
    flop = 4 * images * heads * queries * keys * width
    return Case("attention", shape, HALF, build, elements, flop, sizes=(queries, keys, width))


def combine_case(shape: str) -> Case:
    """One row of DPM-Solver++(2M): state, estimate and one past estimate in, state and history out."""
    size = COMBINES[shape]

    def build(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        draw = _draws(dtype, device, seed)
        x, denoised, past = (draw(*size) for _ in range(3))
        return Inputs(
            ([x, x, denoised, denoised, None, None, past], Sums.of(draw(size[0], 2, 7), [(0, 2, 6), (2,)])), {}
        )

    return Case("combine", shape, FLOAT, build, 5 * torch.Size(size).numel())


def cases() -> list[Case]:
    """Every op on every shape."""
    groups: list[tuple[Callable[[str], Case], dict[str, Any]]] = [
        (norm_case, NORMS), (attention_case, ATTENTIONS), (combine_case, COMBINES), (layer_norm_case, ROWS),
        (geglu_case, ROWS),
    ]  # fmt: skip
    summed = [norm_case(shape, summed=True) for shape in ("tiny", "real", "deep", "decoder")]
    return [make(shape) for make, shapes in groups for shape in shapes] + summed


def ours(device: torch.device) -> Ops:
    """Our kernels themselves, nothing dispatched, with a workspace as a captured plan holds it."""
    from fastdiff.kernels.attention import attention
    from fastdiff.kernels.group_norm_silu import Workspace, group_norm_silu

    workspace = Workspace.on(device)

    def norm(*arguments: Any, **options: Any) -> Tensor:
        return group_norm_silu(*arguments, **options, workspace=workspace)

    return triton_ops()._replace(group_norm_silu=norm, attention=attention)


def call(ops: Ops, case: Case, inputs: Inputs, out: Any = None) -> Tensor | tuple[Tensor, ...]:
    """Run a case by one implementation; ``out``: where to, if that takes it."""
    options = inputs.options if out is None else inputs.options | {"out": out}
    result: Tensor | tuple[Tensor, ...] = getattr(ops, case.op)(*inputs.arguments, **options)
    return (result, options["total"]) if "total" in options and isinstance(result, Tensor) else result


def truth(case: Case, inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
    """The result of plain torch in float64 on the same inputs."""
    arguments = tuple(_double(argument) for argument in inputs.arguments)
    return call(REFERENCE, case, Inputs(arguments, {name: _double(value) for name, value in inputs.options.items()}))


def error(result: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...]) -> float:
    """Largest error of a result, over the largest exact value."""
    if isinstance(result, Tensor) and isinstance(exact, Tensor):
        return relative_error(result, exact)
    # not max(): it would drop a NaN that does not come first
    return float(torch.tensor([relative_error(a, b) for a, b in zip(result, exact, strict=True)]).max())


def last(x: Tensor) -> Tensor:
    """Channels-last."""
    return x.contiguous(memory_format=torch.channels_last)


def _double(value: Any) -> Any:
    if isinstance(value, Sums):
        return Sums.of(value.weights.double(), value.active, value.mixed)
    if isinstance(value, list):
        return [_double(part) for part in value]
    return value.double() if isinstance(value, Tensor) else value


def _draws(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator, device=device).to(dtype)
