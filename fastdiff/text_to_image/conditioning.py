"""What the network is told beside the latents: prompts, what to guide away from, SDXL's sizes, control pictures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.arguments import Prompt, listed
from fastdiff.backends.control import Control, ControlledNetwork
from fastdiff.errors import PlanError, ShapeError
from fastdiff.images import grown, to_tensor
from fastdiff.models.text import Encoded
from fastdiff.sampling.denoiser import Cond
from fastdiff.sampling.guidance import strength_embedding
from fastdiff.text_to_image.parts import Parts


class Guiding(NamedTuple):
    """The conditioning of a batch and what it is guided away from, if anything."""

    cond: Cond
    uncond: Cond | None


class Conditioning(NamedTuple):
    """The conditioning of calls, from their arguments."""

    parts: Parts
    encode: Callable[[Prompt, Prompt | None, int | None], Encoded]  # prompts, those of the second encoder, clip_skip
    dtype: torch.dtype
    device: torch.device

    def of(self, asked: SimpleNamespace, size: tuple[int, int], scale: float, guided: bool) -> Guiding:
        """That of one call.

        Args:
            asked: the arguments of ``TextToImage``'s call.
            size: height and width of the result.
            scale: strength of guidance.
            guided: whether there is anything to guide away from.

        Raises:
            PlanError: on arguments that do not fit one another or this model.
            ShapeError: on negative prompts that do not fit the prompts.
        """
        text = self._texts(
            asked.prompt, asked.prompt_2, asked.prompt_embeds, asked.pooled_prompt_embeds, asked.clip_skip, "prompt"
        )
        negative = self._negative(text, asked) if guided else None
        ids = self._ids(asked.original_size or size, asked.crops_coords_top_left, asked.target_size or size)
        negative_ids = ids
        if asked.negative_original_size is not None and asked.negative_target_size is not None:
            negative_ids = self._ids(
                asked.negative_original_size, asked.negative_crops_coords_top_left, asked.negative_target_size
            )
        repeat = asked.num_images_per_prompt
        return Guiding(
            self._cond(text, ids, repeat, scale),
            None if negative is None else self._cond(negative, negative_ids, repeat, scale),
        )

    def _texts(
        self,
        prompt: Prompt | None,
        prompt_2: Prompt | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
        clip_skip: int | None,
        name: str,
    ) -> Encoded:
        """Encode, or take what is given."""
        if embeds is not None:
            if prompt is not None:
                raise PlanError(f"give {name} or {name}_embeds, not both")
            if self.parts.xl and pooled is None:
                raise PlanError(f"this model needs the pooled embeddings that belong to {name}_embeds")
            dtype, device = self.dtype, self.device
            return Encoded(embeds.to(device, dtype), None if pooled is None else pooled.to(device, dtype))
        if prompt is None:
            raise PlanError(f"give {name} or {name}_embeds")
        return self.encode(prompt, prompt_2, clip_skip)

    def _negative(self, text: Encoded, asked: SimpleNamespace) -> Encoded:
        """What to guide away from, one for each prompt."""
        prompt, prompt_2, embeds = asked.negative_prompt, asked.negative_prompt_2, asked.negative_prompt_embeds
        if embeds is None and prompt is None and self.parts.zero_empty_prompt:
            return Encoded(
                torch.zeros_like(text.tokens), None if text.pooled is None else torch.zeros_like(text.pooled)
            )
        count = len(text.tokens)
        if embeds is None:
            prompt = listed(prompt or "")
            prompt = prompt * count if len(prompt) == 1 else prompt
            prompt_2 = None if prompt_2 is None else listed(prompt_2)
            prompt_2 = prompt_2 * count if prompt_2 is not None and len(prompt_2) == 1 else prompt_2
        # SDXL takes the negative prompt from the layer before the last, whatever clip_skip says
        skip = None if self.parts.xl else asked.clip_skip
        found = self._texts(prompt, prompt_2, embeds, asked.negative_pooled_prompt_embeds, skip, "negative_prompt")
        if found.tokens.shape != text.tokens.shape:
            raise ShapeError(
                f"negative prompts are {tuple(found.tokens.shape)}; needed: {tuple(text.tokens.shape)}, as the prompts"
            )
        return found

    def _cond(self, words: Encoded, sizes: Tensor | None, repeat: int, scale: float) -> Cond:
        batch, config = len(words.tokens) * repeat, self.parts.unet.config
        extra = {"encoder_hidden_states": words.tokens.repeat_interleave(repeat, 0)}
        if config.addition_embed_type is not None:
            if words.pooled is None or sizes is None:
                raise PlanError("this model needs pooled embeddings; its text encoder gives none")
            extra["text_embeds"] = words.pooled.repeat_interleave(repeat, 0)
            extra["time_ids"] = sizes.expand(batch, -1)
        if config.time_cond_proj_dim is not None:
            strengths = torch.full((batch,), scale - 1.0, device=self.device)
            extra["timestep_cond"] = strength_embedding(strengths, config.time_cond_proj_dim).to(self.dtype)
        return Cond(None, extra)

    def _ids(self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor | None:
        """SDXL's sizes, ``[1, 6]``."""
        if self.parts.unet.config.addition_embed_type is None:
            return None
        return torch.tensor([[*original, *crop, *target]], dtype=torch.float32, device=self.device)


def controlled(
    network: Any, parts: Parts, asked: SimpleNamespace, size: tuple[int, int], batch: int
) -> ControlledNetwork:
    """A network steered by the model's ControlNets, which are shown the pictures of a call.

    Args:
        network: the UNet's.
        parts: the model.
        asked: the arguments of ``TextToImage``'s call.
        size: height and width of the result.
        batch: images of the call.

    Raises:
        PlanError: if there are not as many pictures as ControlNets, or on a span outside of 0 to 1.
    """
    nets, pictures = parts.controlnets, asked.control_image
    if not nets or pictures is None:
        raise PlanError("a ControlNet needs control_image, and control_image a model loaded with controlnet")
    shown = [pictures] if len(nets) == 1 else list(pictures)
    if len(shown) != len(nets):
        raise PlanError(f"{len(shown)} control pictures for {len(nets)} ControlNets; allowed: one for each")
    given = (asked.controlnet_conditioning_scale, asked.control_guidance_start, asked.control_guidance_end)
    controls = []
    for i, (net, picture) in enumerate(zip(nets, shown, strict=True)):
        strength, first, last = (v if isinstance(v, int | float) else v[i] for v in given)
        if not 0 <= first <= last <= 1:
            raise PlanError(f"control_guidance_start and _end are {first!r}, {last!r}; allowed: 0 to 1, rising")
        seen = grown(to_tensor("control_image", picture, size, parts.vae.shrink), batch, "control_image")
        controls.append(Control(net, seen, float(strength), first, last))
    return ControlledNetwork(network, controls)
