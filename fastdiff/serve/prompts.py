"""What a request with a prompt becomes, for text-to-image models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastdiff.backends.eager import ops_for
from fastdiff.errors import BackendError, NotFinite, PlanError
from fastdiff.images import to_images
from fastdiff.models.autoencoder_files import load_autoencoder
from fastdiff.models.text import Encoded
from fastdiff.models.tiny_autoencoder import AutoencoderTiny
from fastdiff.pipeline import Pipeline
from fastdiff.serve.errors import Refused
from fastdiff.serve.models import ClassConditional, Served, samplers
from fastdiff.serve.schema import ImageRequest, Order
from fastdiff.text_to_image import DEFAULT_STEPS, TextToImage

KEPT = 64  # prompts whose encoding is kept: 15 MB for Stable Diffusion 1.x, 40 MB for XL, in float32


class TextConditional:
    """A model that draws what a prompt says.

    Each prompt is encoded once, by itself, so that company changes none of its bits.

    Args:
        pipeline: the model; its adapters and encoders may not be changed any more.
        name: what clients call it.
        sizes: heights and widths that may be asked for; the first is drawn unless a request says otherwise. By default
            the model's own, alone.
        preview: decodes previews in place of the model's own decoder, in a fraction of its time.

    Raises:
        BackendError: if the model needs a picture, or ``preview`` is of another latent space.
        ShapeError: on sizes that the model cannot draw.
    """

    def __init__(
        self,
        pipeline: TextToImage,
        name: str,
        sizes: Sequence[tuple[int, int]] = (),
        preview: AutoencoderTiny | None = None,
    ):
        self.pipeline, self.name, self.preview = pipeline, name, preview
        self.samplers = samplers(pipeline.parts.folder)
        _needs_no_picture(pipeline)
        vae = pipeline.parts.vae
        if preview is not None and (preview.latent_channels, preview.grow) != (vae.latent_channels, vae.grow):
            raise BackendError(
                f"the decoder of previews reads {preview.latent_channels} channels and enlarges by {preview.grow}; "
                f"needed: {vae.latent_channels} and {vae.grow}, as the model's own"
            )
        self.sizes = tuple(dict.fromkeys(pipeline.size(*size) for size in sizes or ((None, None),)))
        self._named = {f"{width}x{height}": (height, width) for height, width in self.sizes}
        self._encoded = lru_cache(KEPT)(self._encode)

    def _encode(self, prompt: str) -> Encoded:
        return self.pipeline.encode_prompt(prompt)

    def order(self, request: ImageRequest) -> Order:
        """See ``Served.order``."""
        if request.class_label is not None:
            raise Refused(
                f"class_label is {request.class_label}, but {self.name} is a text-to-image model: give prompt",
                "class_label",
            )
        if request.prompt is None:
            raise Refused(f"prompt is missing; {self.name} draws what it says, anything if it is empty", "prompt")
        first = next(iter(self._named))
        size = first if request.size in (None, "auto") else request.size
        if size not in self._named:
            raise Refused(f"size is {size}; allowed: {', '.join(self._named)}, or auto", "size")
        assert size is not None
        height, width = self._named[size]
        options: dict[str, Any] = {"height": height, "width": width, **self._words(request)}
        names = ("num_inference_steps", "guidance_scale", "sampler")
        options |= {name: value for name in names if (value := getattr(request, name)) is not None}
        return Order(options, size)

    def _words(self, request: ImageRequest) -> dict[str, Tensor | None]:
        """The encoded prompts, as options of a call."""
        assert request.prompt is not None
        text = self._encoded(request.prompt)
        words = {"prompt_embeds": text.tokens, "pooled_prompt_embeds": text.pooled}
        if request.negative_prompt is None and self.pipeline.parts.zero_empty_prompt:
            return words
        negative = self._encoded(request.negative_prompt or "")
        return words | {
            "negative_prompt_embeds": negative.tokens,
            "negative_pooled_prompt_embeds": negative.pooled,
        }

    @torch.no_grad()
    def picture(self, x: Tensor, preview: bool = False) -> Image.Image:
        """See ``Served.picture``.

        Raises:
            NotFinite: if the decoder's result is not, as with one that overflows in float16.
        """
        if preview and self.preview is not None:
            pixels = self.preview.to_images(x.to(next(self.preview.parameters()).dtype)).float()
        else:
            pixels = self.pipeline.decode(x)
        if not bool(pixels.isfinite().all()):
            raise NotFinite("the decoded picture is not finite")
        pictures: list[Image.Image] = to_images(pixels, 0, "pil")
        return pictures[0]

    def facts(self) -> dict[str, Any]:
        """See ``Served.facts``."""
        first, *_ = self._named
        return {
            "classes": [],
            "prompts": True,
            "size": first,
            "sizes": list(self._named),
            "num_inference_steps": DEFAULT_STEPS,
            "sampler": self.pipeline.parts.sampler.options.name,
        }


def _needs_no_picture(pipeline: TextToImage) -> None:
    """Refuse models that a prompt alone is too little for."""
    parts = pipeline.parts
    if parts.controlnets:
        raise BackendError("this model has a ControlNet, which needs a picture; serve takes prompts alone")
    if parts.unet.config.in_channels > parts.vae.latent_channels:
        raise BackendError("this model paints into a picture; serve takes prompts alone")


def served_of(
    pipeline: Pipeline | TextToImage,
    name: str,
    sizes: Sequence[tuple[int, int]] = (),
    preview_decoder: Path | None = None,
) -> Served:
    """A loaded model behind a server.

    Args:
        pipeline: the model.
        name: what clients call it.
        sizes: of text-to-image models, see ``TextConditional``.
        preview_decoder: folder of a tiny autoencoder, likewise.

    Raises:
        PlanError: if these are given for another kind of model, or the decoder is no tiny one.
    """
    if not isinstance(pipeline, TextToImage):
        for option, given in (("size", sizes), ("preview_decoder", preview_decoder)):
            if given:
                raise PlanError(f"{option} is for text-to-image models; {name} is not one")
        return ClassConditional(pipeline, name)
    preview = None
    if preview_decoder is not None:
        preview = load_autoencoder(preview_decoder, pipeline.network.dtype, ops_for(pipeline.device))
        if not isinstance(preview, AutoencoderTiny):
            raise PlanError(f"preview_decoder is {preview_decoder}; allowed: a tiny autoencoder")
        preview = preview.to(pipeline.device)
    return TextConditional(pipeline, name, sizes, preview)
