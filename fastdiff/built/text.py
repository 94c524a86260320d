"""Prompts to what a network reads, without the text encoders' code: tokenizers and graphs of a built folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.built.folder import Folder, Words
from fastdiff.errors import ArtifactError, BackendError
from fastdiff.models.files import one_line

IDS, TOKENS, POOLED = "input_ids", "tokens", "pooled"
_log = logging.getLogger(__name__)


class Read(NamedTuple):
    """Prompts as a network reads them."""

    tokens: Tensor  # [B, L, E]
    pooled: Tensor | None  # [B, E'], of an encoder with a projection


class Reader:
    """One tokenizer and one encoder of a folder, whose graph ``run`` runs on a device."""

    def __init__(self, folder: Folder, words: Words, run: Any, device: torch.device):
        self._tokenizer, self._run, self._device = _tokenizer(folder, words.tokenizer), run, device
        if IDS not in self._run.inputs or TOKENS not in self._run.outputs:
            raise ArtifactError(f"{folder.root / words.graph}: not the graph of a text encoder; build the folder again")

    def __call__(self, prompts: Sequence[str]) -> Read:
        """Read prompts; what does not fit the encoder's length is cut off, with a warning in the log."""
        found = self._tokenizer.encode_batch(list(prompts))
        for tokens in found:
            if tokens.overflowing:  # prompts are private: the log is told nothing of what they say
                _log.warning("a prompt was cut to %d tokens", len(tokens.ids))
        made = self._run({IDS: torch.tensor([tokens.ids for tokens in found], device=self._device)})
        return Read(made[TOKENS], made.get(POOLED))


def _tokenizer(folder: Folder, name: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BackendError("folders of text-to-image models need tokenizers: pip install 'fastdiff[text]'") from error
    file = folder.file(name)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # of its own kinds, none of them public
        raise ArtifactError(f"{file}: not a tokenizer ({one_line(error)})") from error


def read(readers: Sequence[Reader], prompts: Sequence[str]) -> Read:
    """Read prompts by all encoders: tokens side by side, the pooled state of the last one that has it."""
    parts = [reader(prompts) for reader in readers]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Read(torch.cat([part.tokens for part in parts], dim=-1), pooled[-1] if pooled else None)
