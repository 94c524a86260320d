"""Pictures in and out: what people hold in their hands to tensors, and back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import ShapeError

if TYPE_CHECKING:  # loaded where a picture is made or read: tensors in and out work without it
    from PIL import Image

Picture: TypeAlias = "Image.Image | np.ndarray | Tensor"
OUTPUTS = ("pil", "pt", "np", "latent")
MAX_PIXELS = 2**26


class Output(NamedTuple):
    """What a pipeline returns; ``images`` is a list of PIL images, or an array of all of them."""

    images: Any


def to_images(x: Tensor, crop: int, output_type: str) -> Any:
    """Turn samples ``[B, C, H, W]`` in [-1, 1] into what the caller asked for, less ``crop`` pixels on each side."""
    if crop:
        x = x[..., crop:-crop, crop:-crop]
    x = (x / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x
    array = x.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    pixels = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def fitting_size(given: tuple[int | None, int | None], own: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width of a picture, the model's own where None is given.

    Raises:
        ShapeError: if they are no multiples of ``multiple``, or too large.
    """
    found = (own[0] if given[0] is None else given[0], own[1] if given[1] is None else given[1])
    for name, value in zip(("height", "width"), found, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < multiple or value % multiple:
            raise ShapeError(f"{name} is {value!r}; allowed: multiples of {multiple}")
    if found[0] * found[1] > MAX_PIXELS:
        raise ShapeError(f"height and width are {found}; allowed: at most {MAX_PIXELS} pixels")
    return found


def to_tensor(
    name: str, given: Picture | Sequence[Picture], size: tuple[int, int] | None, multiple: int, mode: str = "RGB"
) -> Tensor:
    """Read pictures as ``[B, C, H, W]`` float32 in [0, 1].

    PIL images are converted to ``mode`` and resized; arrays ``[H, W, C]`` or ``[B, H, W, C]`` and tensors ``[C, H, W]``
    or ``[B, C, H, W]`` in [0, 1] are taken as they are and resized where they differ (nearest, as diffusers does).

    Args:
        name: of the argument, for messages.
        given: one picture, or a list of the same kind.
        size: height and width wanted; None: the picture's own, rounded down to ``multiple``.
        multiple: of which height and width have to be.
        mode: of PIL: ``"RGB"``, or ``"L"`` for masks.

    Raises:
        ShapeError: if it is none of these, or a tensor's shape or values do not fit.
    """
    parts = list(given) if isinstance(given, list | tuple) else [given]
    if not parts:
        raise ShapeError(f"{name} is an empty list; allowed: one picture or more")
    stacked = torch.cat([_one(name, part, size, multiple, mode) for part in parts])
    if not bool(stacked.isfinite().all()):
        raise ShapeError(f"{name} holds NaN or infinity; allowed are finite numbers")
    return stacked


def _one(name: str, part: Any, size: tuple[int, int] | None, multiple: int, mode: str) -> Tensor:
    if isinstance(part, np.ndarray):
        x = torch.from_numpy(np.atleast_3d(part).astype(np.float32))
        x = (x[None] if x.dim() == 3 else x).permute(0, 3, 1, 2)
    elif isinstance(part, Tensor):
        x = part.float()
        x = x[None] if x.dim() == 3 else x[None, None] if x.dim() == 2 else x
    else:
        return _read(name, part, size, multiple, mode)
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ShapeError(f"{name} is {tuple(part.shape)}; allowed: 1 or 3 channels, [C, H, W] or [H, W, C] for arrays")
    wanted = size or tuple(int(side) - int(side) % multiple for side in x.shape[2:])
    return x if tuple(x.shape[2:]) == wanted else torch.nn.functional.interpolate(x, size=wanted)


def _read(name: str, part: Any, size: tuple[int, int] | None, multiple: int, mode: str) -> Tensor:
    """A PIL image as ``[1, C, H, W]``."""
    from PIL import Image

    if not isinstance(part, Image.Image):
        raise ShapeError(f"{name} is a {type(part).__name__}; allowed: PIL images, arrays, tensors, or a list of them")
    height, width = size or tuple(side - side % multiple for side in (part.height, part.width))
    if part.size != (width, height):
        part = part.resize((width, height), resample=Image.Resampling.LANCZOS)
    array = np.asarray(part.convert(mode), dtype=np.float32) / 255
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)[None].contiguous()


def grown(x: Tensor, batch: int, name: str) -> Tensor:
    """Repeat pictures ``[b, ...]`` to ``[batch, ...]``.

    Raises:
        ShapeError: if ``b`` does not divide ``batch``.
    """
    if batch % x.shape[0]:
        raise ShapeError(f"{name} holds {x.shape[0]} pictures for {batch} images; allowed: a divisor of that")
    return x.repeat(batch // x.shape[0], *[1] * (x.dim() - 1))


def save_png(image: Image.Image, file: Path, facts: Mapping[str, str]) -> Path:
    """Write a PNG that says how it was made; it appears whole or not at all, whoever else writes the same file.

    A process that is killed may leave a file of its own behind, see ``parts_of``.
    """
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        text.add_text(name, value)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        image.save(temporary, format="PNG", pnginfo=text)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def parts_of(folder: Path) -> list[Path]:
    """What killed processes left of pictures that they were writing to a folder."""
    return list(folder.glob(".*.png.????????.part"))
