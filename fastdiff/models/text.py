"""Prompts to tokens: the text encoders of Stable Diffusion, through transformers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import ArtifactError, BackendError, PlanError
from fastdiff.models.files import find_weights, inside, one_line, read_json
from fastdiff.models.weights import load_strictly

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """What text encoders make of a batch of prompts."""

    tokens: Tensor  # [B, L, E]
    pooled: Tensor | None  # [B, E'], of an encoder with a projection


class TextEncoder:
    """One tokenizer and one encoder.

    Args:
        tokenizer: of transformers.
        model: ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.
    """

    def __init__(self, tokenizer: Any, model: Any):
        self.tokenizer, self.model = tokenizer, model

    @classmethod
    def load(
        cls, tokenizer: str | os.PathLike[str], encoder: str | os.PathLike[str], dtype: torch.dtype,
        variant: str | None = None,
    ) -> TextEncoder:  # fmt: skip
        """Load the two folders of a diffusers model. No code is taken from them, and safetensors only.

        Raises:
            BackendError: if transformers is not installed.
            ArtifactError: if a folder is missing, foreign or damaged.
        """
        transformers, folder = _transformers(), Path(encoder)
        config = read_json(inside(folder, "config.json"))
        names = config.get("architectures") or ["CLIPTextModel"]
        if names[0] not in ENCODERS:
            raise ArtifactError(
                f"{folder / 'config.json'}: architectures is {names!r}; supported: {', '.join(ENCODERS)}"
            )
        find_weights(folder, "model", variant)
        try:
            with _quiet(transformers):
                model = getattr(transformers, names[0]).from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=dtype, variant=variant
                )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ArtifactError(f"{folder}: transformers cannot load it ({one_line(error)})") from error
        return cls(_tokenizer(transformers, tokenizer), model.eval().requires_grad_(False))

    def to(self, device: torch.device) -> TextEncoder:
        """Move the encoder, in place."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], skip: int | None, penultimate: bool) -> Encoded:
        """Encode prompts; what does not fit the encoder's length is cut off, with a warning in the log.

        Args:
            prompts: one for each image.
            skip: layers to leave out at the end (``clip_skip``).
            penultimate: SDXL's: the layer before the last, and no final norm.

        Raises:
            PlanError: if ``skip`` leaves no layer.
        """
        layers = self.model.config.num_hidden_layers
        if skip is not None and not 0 <= skip < layers:
            raise PlanError(f"clip_skip is {skip!r}; allowed: 0 to {layers - 1}")
        ids = self.tokens(prompts)
        for needed in map(len, self.tokenizer(list(prompts), verbose=False).input_ids):
            if needed > ids.shape[1]:  # prompts are private: the log is told nothing of what they say
                _log.warning("a prompt of %d tokens was cut to %d", needed, ids.shape[1])
        return self.of_tokens(ids.to(self.model.device), skip, penultimate)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as numbers ``[B, L]`` int64, cut and filled up to the encoder's length ``L``."""
        length = self.tokenizer.model_max_length
        kwargs = {"max_length": length, "truncation": True, "return_tensors": "pt"}
        ids: Tensor = self.tokenizer(list(prompts), padding="max_length", **kwargs).input_ids
        return ids

    @torch.no_grad()
    def of_tokens(self, ids: Tensor, skip: int | None = None, penultimate: bool = False) -> Encoded:
        """Encode prompts ``[B, L]`` int64 that are tokens already; for the rest see a call."""
        output = self.model(ids, output_hidden_states=penultimate or bool(skip))
        pooled = output[0] if output[0].dim() == 2 else None
        if penultimate:
            return Encoded(output.hidden_states[-((skip or 0) + 2)], pooled)
        if not skip:
            return Encoded(output.last_hidden_state, pooled)
        # older versions of transformers have the norm one level down
        norm = getattr(self.model, "text_model", self.model).final_layer_norm
        return Encoded(norm(output.hidden_states[-(skip + 1)]), pooled)


def text_encoder_of(
    tokenizer: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> TextEncoder:
    """Make an encoder from its config and its tensors, under transformers' names.

    Raises:
        ArtifactError: naming a tensor that is missing or does not fit.
    """
    transformers = _transformers()
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
    own = model.state_dict()
    # versions of transformers differ in whether the plain encoder has a level of its own
    bare = not any(name.startswith("text_model.") for name in own)
    named = {name.removeprefix("text_model.") if bare else name: value for name, value in tensors.items()}
    load_strictly(model, named, "text encoder")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # positions, which no file holds
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return TextEncoder(_tokenizer(transformers, tokenizer), model.to(dtype).eval().requires_grad_(False))


def _tokenizer(transformers: Any, folder: str | os.PathLike[str]) -> Any:
    try:
        return transformers.CLIPTokenizer.from_pretrained(Path(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ArtifactError(f"{folder}: transformers cannot load a tokenizer from it ({one_line(error)})") from error


def encode(
    encoders: Sequence[TextEncoder], prompts: Sequence[Sequence[str]], skip: int | None, penultimate: bool
) -> Encoded:
    """Encode each list of prompts by its encoder; tokens side by side, the pooled state of the last one that has it."""
    parts = [encoder(texts, skip, penultimate) for encoder, texts in zip(encoders, prompts, strict=True)]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Encoded(torch.cat([part.tokens for part in parts], dim=-1), pooled[-1] if pooled else None)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar of transformers' own while it loads."""
    logging_of = transformers.utils.logging
    was = logging_of.is_progress_bar_enabled()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging_of.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackendError("text encoders need transformers: pip install 'fastdiff[text]'") from error
    return transformers
