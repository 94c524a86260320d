"""The public edge of every launcher: which device, which tensors, and where results go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdiff.errors import BackendError, ShapeError

from .tiles import INTERPRETER, Chip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def chip_of(op: str, tensors: tuple[Tensor, ...], *, interpreted: bool) -> Chip:
    """Return the chip that holds ``tensors``; every launcher begins here.

    Raises:
        BackendError: if the tensors lie on several devices or on one that Triton cannot reach, or if autograd
            would record this call: the kernels have no backward.
    """
    device = tensors[0].device
    others = sorted({str(t.device) for t in tensors if t.device != device})
    if others:
        raise BackendError(f"{op}: tensors on {device} and {', '.join(others)}; allowed: one device")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise BackendError(f"{op}: an input requires grad; forward only, allowed: torch.no_grad() or REFERENCE")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)
    if interpreted and device.type == "cpu":
        return INTERPRETER
    raise BackendError(f"{op}: tensors on {device}; allowed: cuda, or cpu in Triton's interpreter (TRITON_INTERPRET=1)")


def check_vectors(op: str, shape: tuple[int, ...], vectors: Mapping[str, Tensor | None]) -> None:
    """Raise ``ShapeError`` unless every vector that is given has this shape and one of ``DTYPES``."""
    for name, vector in vectors.items():
        if vector is not None and (tuple(vector.shape) != shape or vector.dtype not in DTYPES):
            received = f"{tuple(vector.shape)} {vector.dtype}"
            raise ShapeError(f"{op}: {name} {received}; allowed: {shape} in {', '.join(map(str, DTYPES))}")


def check_like(op: str, name: str, tensor: Tensor | None, like: Tensor) -> None:
    """Raise ``ShapeError`` unless a tensor that is given has the shape and dtype of another."""
    if tensor is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype):
        allowed = f"{tuple(like.shape)} {like.dtype}"
        raise ShapeError(f"{op}: {name} {tuple(tensor.shape)} {tensor.dtype}; allowed: {allowed}")


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself where it is channels-last, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def pixel_stride(x: Tensor) -> int | None:
    """Elements from one pixel of ``[B, H, W, C]`` to the next: ``C``, or more in a part of a wider buffer.

    None where channels are not side by side, or pixels not evenly apart.
    """
    _, height, width, channels = x.shape
    pixel = x.stride(2) if width > 1 else x.stride(1) if height > 1 else x.stride(0)
    expected = (height * width * pixel, width * pixel, pixel, 1)
    wrong = any(n > 1 and a != b for n, a, b in zip(x.shape, x.stride(), expected, strict=True))
    return None if wrong or (pixel < channels and x[..., 0].numel() > 1) else pixel


def writable(out: Tensor | None, like: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``out`` where it is given and lies as a kernel writes, else a new tensor shaped and laid out like ``like``."""
    if out is not None and out.is_contiguous(memory_format=layout):
        return out
    return torch.empty_like(like)
