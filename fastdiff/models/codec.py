"""What all autoencoders share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fastdiff.errors import ShapeError
from fastdiff.models.tiling import run_tiled

OVERLAP = 16  # of tiles, in latents, where no overlap is exact


class Codec(nn.Module, ABC):
    """What all autoencoders share: the checks of shapes, the scale of the latents, tiles.

    A subclass gives the fields below and takes both directions apart: what runs at the size of the latents is cheap, so
    the whole image goes through it at once, and only the larger sizes are cut into tiles.
    """

    in_channels: int
    latent_channels: int
    shrink: int  # pixels per latent, on the way in
    grow: int  # and on the way out
    encode_radius: int | None  # how many latents far the part for tiles looks; None: at all it gets
    decode_radius: int | None
    scaling_factor: float
    shift: tuple[float, ...]  # one for all channels, or one for each
    spread: tuple[float, ...]

    @abstractmethod
    def _encode_tile(self, images: Tensor) -> Tensor:
        """From pixels to the size of the latents."""

    @abstractmethod
    def _encode_whole(self, x: Tensor) -> Tensor:
        """From there to what the encoder gives."""

    @abstractmethod
    def _decode_whole(self, latents: Tensor) -> Tensor:
        """From latents to the last that is of their size."""

    @abstractmethod
    def _decode_tile(self, x: Tensor) -> Tensor:
        """From there to pixels."""

    @property
    def exact_overlap(self) -> int | None:
        """The overlap, in latents, from which tiles are exact both ways, up to rounding; None if none is enough."""
        if self.encode_radius is None or self.decode_radius is None:
            return None
        return 2 * max(self.encode_radius, self.decode_radius)

    @property
    def overlap(self) -> int:
        """What tiles share unless told otherwise, in latents: ``exact_overlap``, or 16 where none is exact."""
        return OVERLAP if self.exact_overlap is None else self.exact_overlap

    def normalise(self, raw: Tensor) -> Tensor:
        """What the encoder gives -> what a diffusion network sees; ``[B, C, h, w]`` both."""
        return (raw - self._row(self.shift, raw)) * (self.scaling_factor / self._row(self.spread, raw))

    def denormalise(self, latents: Tensor) -> Tensor:
        """What a diffusion network gives -> what the decoder expects; ``[B, C, h, w]`` both."""
        return latents * (self._row(self.spread, latents) / self.scaling_factor) + self._row(self.shift, latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw ``latents [B, C, h, w]`` -> images ``[B, 3, H, W]``, about [-1, 1] and not clamped.

        Raises:
            ShapeError: if the latents do not fit.
        """
        return self._decode_tile(self._decode_whole(self._checked(latents, "latents", self.latent_channels, 1)))

    def decode_tiled(self, latents: Tensor, tile: int = 64, overlap: int | None = None) -> Tensor:
        """Decode tile by tile, as ``decode`` otherwise; see the class for the error.

        Args:
            latents: raw, ``[B, C, h, w]``.
            tile: height and width of a tile, in latents. Latents that are not larger are not cut.
            overlap: that neighbours share at least, in latents; below ``tile``. None: ``exact_overlap``, or 16 where
                none is exact.

        Raises:
            ShapeError: if the latents or the tiles do not fit.
        """
        x = self._decode_whole(self._checked(latents, "latents", self.latent_channels, 1))
        return run_tiled(
            self._decode_tile, x, tile=tile, overlap=self._overlap(overlap), radius=self.decode_radius, grow=self.grow
        )

    def to_images(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """What a diffusion network gives, ``[B, C, h, w]``, -> images ``[B, 3, H, W]``, as ``decode``.

        Args:
            latents: what to decode.
            tile: of ``decode_tiled``; None: in one piece.
        """
        raw = self.denormalise(latents)
        return self.decode(raw) if tile is None else self.decode_tiled(raw, tile)

    def _encode(self, images: Tensor) -> Tensor:
        return self._encode_whole(self._encode_tile(self._checked(images, "images", self.in_channels, self.shrink)))

    def _encode_in_tiles(self, images: Tensor, tile: int, overlap: int | None) -> Tensor:
        images = self._checked(images, "images", self.in_channels, self.shrink)
        plan = {"tile": tile, "overlap": self._overlap(overlap), "shrink": self.shrink}
        return self._encode_whole(run_tiled(self._encode_tile, images, radius=self.encode_radius, **plan))

    def _overlap(self, overlap: int | None) -> int:
        return self.overlap if overlap is None else overlap

    def _checked(self, x: Tensor, name: str, channels: int, multiple: int) -> Tensor:
        sizes = x.shape[2:]
        if x.dim() != 4 or x.shape[1] != channels or any(size < 1 or size % multiple for size in sizes):
            each = f", H and W multiples of {multiple}" if multiple > 1 else ""
            raise ShapeError(f"{name} are {list(x.shape)}; needed: [B, {channels}, H, W]{each}")
        return x

    @staticmethod
    def _row(values: tuple[float, ...], like: Tensor) -> Tensor | float:
        """One number as it is (no upload), several as ``[1, C, 1, 1]``."""
        if len(values) == 1:
            return values[0]
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
