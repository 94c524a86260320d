"""The text encoders of Stable Diffusion as ONNX: tokens in, what the UNet reads out; and their tokenizers as one file.

The encoders are models of transformers, whose forward passes build masks, read flags and keep lists in ways that change
with its versions. So CLIP's text model, which is small, is written down here once more, over transformers' own layers
and weights; the export measures it against transformers' forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.artifact import Manifest
from fastdiff.errors import ArtifactError, BackendError
from fastdiff.export.graph import Graph
from fastdiff.export.networks import BATCH
from fastdiff.export.parity import Inputs, Original
from fastdiff.export.publish import USUAL, Options, Part, finish, measured
from fastdiff.export.symbol import Symbol
from fastdiff.export.targets import Target, target_of
from fastdiff.export.trace import stand_in
from fastdiff.models.files import write_text
from fastdiff.models.text import TextEncoder
from fastdiff.models.weights import weights_hash

KIND = "text_encoder"
LEGACY_END = 2  # an end of text that early configs name, and that means: the largest token
PHRASES = ("", "a photo of a cat", "Two dogs, red & blue!", "  naïve café: 12,345 % ", "a " * 200, "\u732b \U0001f431")


def text_graph(encoder: TextEncoder, penultimate: bool, target: Target, dtype: torch.dtype) -> Graph:
    """``input_ids [batch, L]`` -> ``tokens [batch, L, E]``, and ``pooled [batch, E']`` where there is a projection."""
    graph, model = Graph(KIND, target), encoder.model
    net: Any = stand_in(model, graph, dtype)
    text: Any = getattr(net, "text_model", net)  # a level that only some versions of transformers have
    length, layers = encoder.tokenizer.model_max_length, list(text.encoder.layers)
    ids: Any = graph.input("input_ids", (BATCH, length), torch.int64)
    x = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding(_places(graph, length))
    states = [x]
    for layer in layers:
        states.append(_layer(layer, states[-1], model.config.num_attention_heads))
    last = text.final_layer_norm(states[-1])
    graph.output("tokens", (states[-2] if penultimate else last).to(torch.float32))
    if hasattr(net, "text_projection"):
        pooled = net.text_projection(_at_end(graph, last, ids, model.config.eos_token_id))
        graph.output("pooled", pooled.to(torch.float32))
    return graph


def _places(graph: Graph, length: int) -> Symbol:
    """``0, 1, ...`` as a value of the graph, ``[1, length]``."""
    return graph.constant(torch.arange(length)[None])


def _layer(layer: Any, x: Any, heads: int) -> Any:
    """One layer of CLIP: attention to what came before, then two products. ``x [batch, L, E]``."""
    attend, shape = layer.self_attn, x.shape
    y = layer.layer_norm1(x)
    q, k, v = (
        project(y).reshape(*shape[:2], heads, shape[2] // heads).permute(0, 2, 1, 3)
        for project in (attend.q_proj, attend.k_proj, attend.v_proj)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + attend.out_proj(mixed.permute(0, 2, 1, 3).reshape(*shape))
    return x + layer.mlp(layer.layer_norm2(x))


def _at_end(graph: Graph, x: Any, ids: Any, end: int) -> Any:
    """What stands at the end of each text: ``[batch, L, E]`` -> ``[batch, E]``."""
    marks = ids if end == LEGACY_END else ids == end
    place = torch.argmax(marks.to(torch.float32), -1)  # the first one: texts are filled up with ends
    chosen: Any = (place[:, None] == _places(graph, x.shape[1])).to(x.dtype)
    return graph.node("MatMul", [chosen[:, None], x], (x.shape[0], 1, x.shape[2]), x.dtype)[:, 0]


def export_text_encoder(
    encoder: TextEncoder, file: str | os.PathLike[str], *, penultimate: bool = False, options: Options = USUAL
) -> Manifest:
    """Export a text encoder; the batch is free, the number of tokens that of its tokenizer.

    Args:
        encoder: float32.
        file: where to write, as ``export_unet``.
        penultimate: SDXL's: the layer before the last, and no final norm.
        options: how.

    Raises:
        PlanError: on options that do not fit.
        ArtifactError: if the graph is not valid or does not reproduce transformers' model.
    """
    target, place = target_of(options.target, options.opset, options.dtype), Path(file)
    graph = text_graph(encoder, penultimate, target, options.dtype)

    def call(given: Inputs) -> dict[str, Tensor]:
        found = encoder.of_tokens(given["input_ids"], None, penultimate)
        return {"tokens": found.tokens} if found.pooled is None else {"tokens": found.tokens, "pooled": found.pooled}

    cases = {f"batch {len(texts)}": {"input_ids": encoder.tokens(texts)} for texts in (PHRASES[1:2], PHRASES)}
    original = Original(encoder.model, call)
    told = cases if measured(options) else {}
    return finish(place, [Part(place.name, graph)], KIND, weights_hash(encoder.model), options, original, told)


def write_tokenizer(encoder: TextEncoder, file: Path) -> None:
    """Write a tokenizer as the one file that the library ``tokenizers`` reads, cut and filled up to its length.

    Raises:
        BackendError: if this version of transformers has no such form of it.
        ArtifactError: if the file gives other tokens than the tokenizer.
    """
    from tokenizers import Tokenizer

    own = encoder.tokenizer
    if not hasattr(own, "backend_tokenizer"):
        raise BackendError("this version of transformers keeps tokenizers in a form of its own; needed: 5 or newer")
    made = Tokenizer.from_str(own.backend_tokenizer.to_str())
    length = own.model_max_length
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=own.pad_token_id, pad_token=own.pad_token)
    write_text(file, made.to_str())
    again = Tokenizer.from_file(str(file))
    _same(encoder.tokens(PHRASES).tolist(), [found.ids for found in again.encode_batch(list(PHRASES))], file)


def _same(wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]], file: Path) -> None:
    for phrase, theirs, ours in zip(PHRASES, wanted, got, strict=True):
        if list(theirs) != list(ours):
            raise ArtifactError(f"{file}: gives other tokens than the model's tokenizer for {phrase!r}")
