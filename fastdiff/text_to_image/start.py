"""What a walk starts from: noise, a picture, or the parts of a picture that stay.

Draws of a ``generator`` are taken in diffusers' order: picture, noise, masked picture, and then the walk's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.images import grown, to_tensor
from fastdiff.models.autoencoder import AutoencoderKL
from fastdiff.models.tiny_autoencoder import AutoencoderTiny
from fastdiff.sampling.noise import GeneratorNoise
from fastdiff.sampling.parts import Generators, make_noise

BEYOND = 2**31 - 1  # numbers of draws that no walk comes to
PICTURE, MASKED = 1, 2


class Start(NamedTuple):
    """Noise, and what there is of a picture, as latents."""

    noise: Tensor | None  # [B, C, h, w]; None: the walk draws it
    image: Tensor | None = None  # [B, C, h, w]
    mask: Tensor | None = None  # [B, 1, h, w], 1 where to paint
    concat: Tensor | None = None  # [B, 1 + C, h, w]: mask and masked picture, for networks that read them
    strength: float = 1.0


class Draws:
    """Noise beside that of the loop: for the encoder, from the same seeds or generators."""

    def __init__(
        self, seed: int | Sequence[int] | None, generator: Generators | None, batch: int, device: torch.device
    ):
        self.generator, self.batch, self.device = generator, batch, device
        self.shared = isinstance(generator, torch.Generator)
        self.seeds: int | Sequence[int] | None = seed
        if seed is None and generator is None:
            self.seeds = int(torch.randint(2**62, ()))

    def noise(self, shape: tuple[int, ...]) -> Tensor | None:
        """The next draw of the generators; None where there are seeds, whose draws have numbers."""
        return None if self.generator is None else self.of(shape, 0)

    def of(self, shape: tuple[int, ...], number: int) -> Tensor:
        """A draw: the next one of the generators, or that of a number no walk comes to."""
        if self.generator is not None:
            return GeneratorNoise(self.generator, shape, 0, self.device).values[0]
        noise = make_noise(shape, 0, self.seeds, None, self.device, initial=True)
        index = torch.full((shape[0],), BEYOND - number, dtype=torch.int64, device=self.device)
        return noise.draw(index, torch.empty(shape, device=self.device))


def encoded(vae: AutoencoderKL | AutoencoderTiny, picture: Tensor, draws: Draws, number: int) -> Tensor:
    """Latents of pictures ``[b, 3, H, W]`` in [-1, 1], drawn from what the encoder gives: ``[B, C, h, w]`` float32."""
    picture = picture.to(draws.device, next(vae.parameters()).dtype)
    if not draws.shared:  # each image has its own seed or generator
        picture = grown(picture, draws.batch, "image")
    if isinstance(vae, AutoencoderTiny):
        found = vae.to_latents(picture)
    else:
        sides = (side // vae.shrink for side in picture.shape[2:])
        noise = draws.of((len(picture), vae.latent_channels, *sides), number)
        found = vae.to_latents(picture, noise.to(picture.dtype))
    return grown(found.float(), draws.batch, "image")


def start(
    vae: AutoencoderKL | AutoencoderTiny,
    image: Any,
    mask_image: Any,
    size: tuple[int, int],
    strength: float,
    latents: Tensor | None,
    draws: Draws,
    reads_mask: bool,
) -> Start:
    """Prepare a call.

    Args:
        vae: makes latents of pictures.
        image: pictures to start from, or None.
        mask_image: where to paint into them, or None.
        size: height and width of the result.
        strength: how much of the picture is made anew.
        latents: the starting noise, if given.
        draws: where noise comes from.
        reads_mask: does the network read the mask and the masked picture (nine channels)?

    Raises:
        PlanError: on a mask without a picture, or a network that misses one of the two.
        ShapeError: on pictures that do not fit.
    """
    if reads_mask and (image is None or mask_image is None):
        raise PlanError("this network paints into a picture: give image and mask_image")
    if image is None:
        if mask_image is not None:
            raise PlanError("mask_image needs a picture to paint into: give image")
        return Start(latents)
    picture = 2 * to_tensor("image", image, size, vae.shrink) - 1
    if mask_image is None:
        return Start(latents, encoded(vae, picture, draws, PICTURE), strength=strength)
    known = None if reads_mask and strength == 1 else encoded(vae, picture, draws, PICTURE)
    shape = (draws.batch, vae.latent_channels, *(side // vae.shrink for side in size))
    noise = draws.noise(shape) if latents is None else latents
    holes = to_tensor("mask_image", mask_image, size, vae.shrink, "L").mean(1, keepdim=True)
    holes = (holes >= 0.5).float().to(draws.device)
    masked = None
    if reads_mask or draws.generator is not None:  # diffusers draws for the masked picture in either case
        masked = encoded(vae, picture.to(draws.device) * (holes < 0.5), draws, MASKED)
    small = grown(F.interpolate(holes, size=shape[2:]), draws.batch, "mask_image")
    if not reads_mask or masked is None:
        return Start(noise, known, small, None, strength)
    return Start(noise, known, None, torch.cat([small, masked], 1), strength)
