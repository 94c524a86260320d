"""Low-rank adapters: read from any common layout, several merged at once into running weights, taken out bit for bit.

Files name their layers in many ways; all become one: the part of the pipeline, a dot, and the path of the layer with
``_`` for every dot (``unet.mid_block_attentions_0_proj_in``). Kohya's files hold no more than that, so nothing is
guessed: a name is looked up among the layers there are.

A merge costs no memory or time while sampling. The parameters keep their addresses, so a CUDA graph or a compiled
network that reads them stays valid; one that folded them into constants does not see the change.

Not safe beside other work: a swap must not run while a step runs, nor beside another swap of the same modules, and a
module belongs to one ``LoraSet``. Whatever was computed from the weights (text embeddings, prepared time projections)
has to be computed again. Remove all adapters before other weights are loaded into the module.

Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1: ``W + strength * alpha / rank * up @ down``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.models.files import read_tensors
from fastdiff.models.single_file import family_modules

# How a name starts, and which part of the pipeline it means. The first that fits counts; none means the UNet.
_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
    "diffusion_model.": "unet",
}

# How a name ends, and what the tensor is.
_ENDS = {
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # diffusers before peft
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers' attention processors
    "_lora.up.weight": "up",
}
# The projections of those processors, as layers.
_PROCESSORS = {
    "unet": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}

# Pieces of names that mean another method, which merging as plain LoRA would silently get wrong.
_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "on_input": "IA3",
    "w_norm": "trained norms",
    "b_norm": "trained norms",
    "diff": "a full difference of weights",
    "diff_b": "a difference of biases",
    "bias": "trained biases",
}
_ALLOWED = "LoRA of linear and convolution layers in kohya, peft or diffusers names"
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's config


@dataclass(frozen=True)
class Factors:
    """The change of one layer: ``scale * up @ down``, in the layer's own layout of inputs."""

    down: Tensor  # [rank, in] or [rank, in, kh, kw]
    up: Tensor  # [out, rank]
    scale: float  # alpha / rank
    source: str  # the name of the down factor in the file, for messages

    @property
    def rank(self) -> int:
        """How many directions change."""
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """One adapter, as read: which layers it changes and how."""

    targets: Mapping[str, Factors]  # 'unet.mid_block_...' -> factors
    source: str = "LoRA"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that it changes."""
        return tuple(sorted({target.partition(".")[0] for target in self.targets}))

    def only(self, *parts: str) -> Lora:
        """The same adapter for some parts of a pipeline, such as the UNet alone."""
        kept = {target: factors for target, factors in self.targets.items() if target.partition(".")[0] in parts}
        return Lora(kept, self.source)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass
class _Target:
    """What a file holds of one layer."""

    path: str  # as the file spells it, without the part
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by role: down, up, mid, alpha
    names: dict[str, str] = field(default_factory=dict)  # by role: the name in the file


def read_lora(source: str | os.PathLike[str] | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Lora:
    """Read an adapter in any layout of kohya's scripts, peft or diffusers.

    Args:
        source: a ``.safetensors`` file, or its tensors.
        metadata: the file's text facts, where tensors are given. Only diffusers' record of the peft config is read: it
            gives alpha where the file holds no ``.alpha`` tensor. Without either alpha is the rank.

    Raises:
        ArtifactError: naming the first tensor that is damaged, of another method, or has no counterpart.
    """
    label = "LoRA"
    if not isinstance(source, Mapping):
        label = str(source)
        source = read_tensors(path := Path(source))
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {}) if metadata is None else metadata
    facts = _peft_facts(metadata or {}, label)
    found = _collect(source, label)
    if not found:
        raise ArtifactError(f"{label}: holds no tensor; needed: {_ALLOWED}")
    return Lora({key: _factors(target, key, facts, label) for key, target in found.items()}, label)


def _collect(tensors: Mapping[str, Tensor], label: str) -> dict[str, _Target]:
    found: dict[str, _Target] = {}
    for name, tensor in tensors.items():
        part, path, role = _parse(name, label)
        target = found.setdefault(f"{part}.{_flat(part, path)}", _Target(path))
        if role in target.tensors:
            raise ArtifactError(f"{label}: {target.names[role]!r} and {name!r} are the same factor of one layer")
        if not tensor.is_floating_point() and role != "alpha":
            raise ArtifactError(f"{label}: {name!r} is {tensor.dtype}; allowed are float types")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{label}: {name!r} holds values that are not finite")
        target.tensors[role], target.names[role] = tensor, name
    return found


def _parse(name: str, label: str) -> tuple[str, str, str]:
    """A tensor's name as (part of the pipeline, path of the layer, role)."""
    for piece in name.split("."):
        for mark, method in _REFUSED.items():
            if piece == mark or (mark.endswith("_") and piece.startswith(mark)):
                raise ArtifactError(f"{label}: {name!r} is of {method}; supported: {_ALLOWED}")
    end = next((end for end in _ENDS if name.endswith(end)), None)
    if end is None:
        raise ArtifactError(f"{label}: {name!r} is of no known layout; supported: {_ALLOWED}")
    start = next((start for start in _PARTS if name.startswith(start)), "")
    part, path = _PARTS.get(start, "unet"), name.removeprefix(start).removesuffix(end)
    if end.startswith("_lora"):
        head, _, projection = path.rpartition(".")
        layers = _PROCESSORS["unet" if part == "unet" else "text_encoder"]
        if projection not in layers:
            raise ArtifactError(f"{label}: {name!r} is of no known projection; allowed: {', '.join(layers)}")
        path = f"{head.removesuffix('.processor')}.{layers[projection]}"
    return part, path, _ENDS[end]


def _flat(part: str, path: str) -> str:
    """The path of a layer without dots, under diffusers' names."""
    flat = path.replace(".", "_")
    return _original_names().get(flat, flat) if part == "unet" else flat


@cache
def _original_names() -> dict[str, str]:
    """Kohya names the layers of SDXL as the original checkpoints do."""
    return {old.replace(".", "_"): new.replace(".", "_") for old, new in family_modules().items()}


def _factors(target: _Target, key: str, facts: Mapping[str, Any], label: str) -> Factors:
    """Check what a file holds of one layer, and bring it to two factors."""
    tensors, names = target.tensors, target.names
    for role in ("down", "up"):
        if role not in tensors:
            raise ArtifactError(f"{label}: {next(iter(names.values()))!r} has no {role} factor beside it")
    down, up = tensors["down"], tensors["up"]
    for role in ("down", "up"):
        if tensors[role].ndim not in (2, 4):
            raise ArtifactError(f"{label}: {names[role]!r} is {list(tensors[role].shape)}; needed: 2 or 4 axes")
    rank = down.shape[0]
    if rank < 1 or up.shape[1:].numel() != rank or up.shape[1] != rank:
        raise ArtifactError(f"{label}: {names['up']!r} is {list(up.shape)}; needed: [out, {rank}]")
    if "mid" in tensors:
        down = _with_middle(tensors["mid"], down, f"{label}: {names['mid']!r}")
    alpha = _alpha(target, label)
    scale = _stated_scale(facts, key, target.path, rank, label) if alpha is None else alpha / rank
    return Factors(down.contiguous(), up.flatten(1).contiguous(), scale, names["down"])


def _with_middle(middle: Tensor, down: Tensor, what: str) -> Tensor:
    """A convolution in three factors as one in two: the middle ``[R, r, kh, kw]`` after the 1x1 down ``[r, in]``."""
    rank, pointwise = down.shape[0], down.flatten(1)
    if middle.ndim != 4 or middle.shape[:2] != (rank, rank) or pointwise.shape[1] != down.shape[1]:
        raise ArtifactError(f"{what} is {list(middle.shape)}; needed: [{rank}, {rank}, kh, kw] after a 1x1 down factor")
    return torch.einsum("oikl,ij->ojkl", middle.float(), pointwise.float())


def _alpha(target: _Target, label: str) -> float | None:
    alpha = target.tensors.get("alpha")
    if alpha is None:
        return None
    if alpha.numel() != 1:
        raise ArtifactError(f"{label}: {target.names['alpha']!r} is {list(alpha.shape)}; needed: one number")
    return float(alpha)


def _peft_facts(metadata: Mapping[str, str], label: str) -> dict[str, Any]:
    """Diffusers' record of the peft config: ``{'unet.lora_alpha': 8, ...}``, or without the part for one module."""
    if _METADATA not in metadata:
        return {}
    try:
        facts = json.loads(metadata[_METADATA])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{label}: metadata {_METADATA!r} is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(facts, dict):
        raise ArtifactError(f"{label}: metadata {_METADATA!r} holds a {type(facts).__name__}; allowed: one JSON object")
    for key, value in facts.items():
        if key.rpartition(".")[2] == "use_dora" and value:
            raise ArtifactError(f"{label}: metadata says {key} is {value!r}; supported: {_ALLOWED}")
    return facts


def _stated_scale(facts: Mapping[str, Any], key: str, path: str, rank: int, label: str) -> float:
    """``alpha / rank``, or ``alpha / sqrt(rank)`` where the record asks for it; 1 if nothing is recorded.

    Source of the root: Kalajdzievski 2023, arXiv:2312.03732.
    """
    part = key.partition(".")[0]

    def fact(name: str, default: Any) -> Any:
        return facts.get(f"{part}.{name}", facts.get(name, default))

    alpha, patterns = fact("lora_alpha", rank), fact("alpha_pattern", {}) or {}
    if not isinstance(patterns, dict):
        raise ArtifactError(f"{label}: metadata alpha_pattern is {patterns!r}; allowed: an object of names and numbers")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"[\w.]+", pattern):  # peft allows any expression; no published file has been seen to
            raise ArtifactError(
                f"{label}: metadata alpha_pattern holds {pattern!r}; allowed: the end of a layer's name"
            )
        if path == pattern or path.endswith(f".{pattern}"):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ArtifactError(f"{label}: metadata gives alpha {alpha!r} for {path!r}; allowed: a finite number")
    return alpha / (math.sqrt(rank) if fact("use_rslora", False) else rank)


# --- merging ------------------------------------------------------------------------------------------------------

_Layer = nn.Linear | nn.Conv2d
_BLOCK = 2**21  # elements of a weight that a CPU works on at once: 8 MiB of float32


class LoraSet:
    """The adapters of some running modules, and what is merged into them now.

    Args:
        modules: the parts of a pipeline by name, such as ``{'unet': ..., 'text_encoder': ...}``. Their linear and
            ungrouped convolution layers can be changed, whatever the float type, device and memory format.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._layers = {f"{part}.{flat}": m for part, root in modules.items() for flat, m in _layers(part, root)}
        self._parts = tuple(modules)
        self._adapters: dict[str, dict[_Layer, Factors]] = {}
        self._active: dict[str, float] = {}
        self._originals: dict[_Layer, Tensor] = {}  # on the CPU, of the layers that loaded adapters change
        self._merged: set[_Layer] = set()  # the layers whose weights are not the original ones now

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded."""
        return tuple(self._adapters)

    @property
    def active(self) -> dict[str, float]:
        """The adapters that are merged now, and their strengths."""
        return dict(self._active)

    def load(self, name: str, lora: Lora) -> None:
        """Make an adapter known, and keep the original weights of its layers. No weight changes until ``set``.

        Raises:
            ArtifactError: naming the first tensor that belongs to no layer or does not fit it, or a name in use.
        """
        if name in self._adapters:
            raise ArtifactError(f"adapter {name!r} is loaded already; remove it first")
        bound: dict[_Layer, Factors] = {}
        for target, factors in lora.targets.items():
            layer = self._layers.get(target)
            what = f"{lora.source}: {factors.source!r}"
            if layer is None:
                parts = ", ".join(self._parts)
                raise ArtifactError(
                    f"{what} belongs to no layer ({target}); allowed: linear and conv layers of {parts}"
                )
            if layer in bound:
                raise ArtifactError(f"{what} and {bound[layer].source!r} change the same layer")
            _check_fit(factors, layer.weight, what)
            bound[layer] = factors
        # here rather than at the first swap: fresh memory is slow, and a swap should take the same time always
        new = [layer for layer in bound if layer not in self._originals]
        self._originals |= {layer: layer.weight.detach().to("cpu", copy=True) for layer in new}
        self._adapters[name] = bound

    def set(self, strengths: Mapping[str, float]) -> None:
        """Merge exactly these adapters, each with its strength, in place; every other is taken out.

        The result depends on the strengths alone, not on what was merged before. A layer that no adapter changes any
        more gets its original bits back. If a swap fails halfway, as when memory runs out, all layers do.

        Args:
            strengths: by adapter; 0 leaves it out, a negative strength does the opposite.

        Raises:
            ArtifactError: if a name is not loaded or a strength is not a finite number; nothing has changed then.
        """
        for name, strength in strengths.items():
            if name not in self._adapters:
                raise ArtifactError(f"adapter {name!r} is not loaded; allowed: {', '.join(self._adapters) or 'none'}")
            number = isinstance(strength, int | float) and not isinstance(strength, bool)
            if not number or not math.isfinite(strength):
                raise ArtifactError(f"strength of adapter {name!r} is {strength!r}; allowed: a finite number")
        # in the order of loading, so that the sum is rounded alike however the caller orders it
        active = {name: float(strengths[name]) for name in self._adapters if strengths.get(name, 0)}
        changes: dict[_Layer, list[tuple[Factors, float]]] = {}
        for name, strength in active.items():
            for layer, factors in self._adapters[name].items():
                changes.setdefault(layer, []).append((factors, strength * factors.scale))
        try:
            self._restore(self._merged - changes.keys())
            self._merge(changes)
        except BaseException:
            self._active = {}
            self._restore(set(self._merged))
            raise
        self._active = active

    def remove(self, name: str) -> None:
        """Forget an adapter, taking it out of the weights first.

        Raises:
            ArtifactError: if it is not loaded.
        """
        if name not in self._adapters:
            raise ArtifactError(f"adapter {name!r} is not loaded; allowed: {', '.join(self._adapters) or 'none'}")
        if name in self._active:
            self.set({other: strength for other, strength in self._active.items() if other != name})
        del self._adapters[name]
        used = {layer for bound in self._adapters.values() for layer in bound}
        self._originals = {layer: original for layer, original in self._originals.items() if layer in used}

    def clear(self) -> None:
        """Forget all adapters; the weights are bit for bit what they were."""
        self.set({})
        self._adapters.clear()
        self._originals.clear()

    @torch.no_grad()
    def _restore(self, layers: Iterable[_Layer]) -> None:
        for layer in layers:
            layer.weight.copy_(self._originals[layer])
            self._merged.discard(layer)

    @torch.no_grad()
    def _merge(self, changes: Mapping[_Layer, list[tuple[Factors, float]]]) -> None:
        scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for layer, parts in changes.items():
            weight = layer.weight
            kind = weight.device, torch.promote_types(weight.dtype, torch.float32)
            if kind not in scratch:  # one for all layers: fresh memory costs more than the arithmetic
                scratch[kind] = _scratch([other.weight for other in changes], *kind)
            self._merged.add(layer)
            _write(weight, self._originals[layer], parts, scratch[kind])


def _scratch(weights: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Room for the sum of any of these layers; on a CPU for a few rows of it, so that the sum stays in the cache."""
    most = max(weight.numel() for weight in weights)
    widest = max(weight[0].numel() for weight in weights)
    return torch.empty(max(widest, min(most, _BLOCK)) if device.type == "cpu" else most, device=device, dtype=dtype)


def _write(weight: Tensor, original: Tensor, parts: list[tuple[Factors, float]], scratch: Tensor) -> None:
    """``weight = original + sum of scale * up @ down``, rounded once; the adapters stand side by side as one."""
    # the inputs of a row in the order in which they lie in memory, so that copies are straight
    permuted = weight.ndim == 4 and not weight.is_contiguous()
    if permuted:
        weight, original = _channels_last(weight), _channels_last(original)
    down = torch.cat([_rows(factors.down, permuted).to(scratch) for factors, _ in parts])
    up = torch.cat([factors.up.to(scratch) * scale for factors, scale in parts], dim=1)
    rows = scratch.numel() // down.shape[1]
    for target, source, some in zip(*(torch.split(tensor, rows) for tensor in (weight, original, up)), strict=True):
        total = scratch[: target.numel()].view(target.shape)
        total.copy_(source)
        total.flatten(1).addmm_(some, down)
        target.copy_(total)


def _rows(down: Tensor, permuted: bool) -> Tensor:
    """A down factor as ``[rank, fan_in]``."""
    return (_channels_last(down) if permuted and down.ndim == 4 else down).flatten(1)


def _channels_last(weight: Tensor) -> Tensor:
    """A view of ``[out, in, kh, kw]`` as ``[out, kh, kw, in]``."""
    return weight.permute(0, 2, 3, 1)


def _layers(part: str, root: nn.Module) -> Iterable[tuple[str, _Layer]]:
    """Every layer that can be changed, under the flat names that files may give it."""
    for name, module in root.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) != 1:
            continue
        flat = name.replace(".", "_")
        yield flat, module
        if part.startswith("text_encoder"):
            # transformers from 5.6 on has no `text_model` around CLIPTextModel; files were written with and without
            bare = flat.removeprefix("text_model_")
            yield (f"text_model_{flat}" if bare == flat else bare), module


def _check_fit(factors: Factors, weight: Tensor, what: str) -> None:
    """A 1x1 kernel is a linear layer, and the other way round; nothing else may differ."""
    down, up = list(factors.down.shape), list(factors.up.shape)
    inputs, kernel = weight.shape[1], tuple(weight.shape[2:]) or (1, 1)
    if down[1] != inputs or (tuple(down[2:]) or (1, 1)) != kernel:
        needed = [factors.rank, *weight.shape[1:]]
        raise ArtifactError(f"{what} is {down}; needed for its layer: {needed}")
    if up[0] != weight.shape[0]:
        raise ArtifactError(f"{what} has an up factor of {up}; needed for its layer: {[weight.shape[0], factors.rank]}")
