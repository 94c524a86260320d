"""Our UNet on the parameters of a diffusers UNet: what is shared, what is watched, and LoRA.

Nothing is copied: our modules hold the very ``Parameter`` objects of diffusers' modules. So whatever changes a
parameter in place, or through its ``.data`` (``pipe.to``, ``load_state_dict``, ``fuse_lora``), is followed without
being noticed. What replaces a parameter or a module, or changes what a module does, is noticed by ``Binding.current``,
which is asked at every call: it compares a few thousand references, well under a millisecond.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.models.config import CONDITIONAL, UNCONDITIONAL, UNetConfig
from fastdiff.models.unet import TokenAttention, UNet

PLAIN = {"Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding", "LoRACompatibleLinear", "LoRACompatibleConv"}
FREEU = ("s1", "s2", "b1", "b2")


class LeftAlone(Exception):
    """Why diffusers' own forward is to run."""


def is_unet(module: object) -> bool:
    """Is this one of the two networks that we know, unchanged?"""
    kind = type(module)
    return kind.__name__ in (CONDITIONAL, UNCONDITIONAL) and kind.__module__.startswith("diffusers.")


def build(theirs: Any) -> UNet:
    """Our network of a diffusers UNet's config, without storage.

    Raises:
        LeftAlone: naming the key of the config that we do not honour.
    """
    config: Mapping[str, Any] = theirs.config
    try:
        sizes = UNetConfig.from_dict({**config, "_class_name": type(theirs).__name__, "sample_size": None})
    except ArtifactError as error:
        raise LeftAlone(str(error).removeprefix("config.json: ")) from None
    with torch.device("meta"):
        ours = UNet(sizes).eval().requires_grad_(False)
    for module in ours.modules():
        if isinstance(module, TokenAttention):
            module.upcast = False  # diffusers' processor does not either
    return ours


def stamp(tensor: Tensor) -> tuple[int, int]:
    """A value that changes with a tensor's storage and with changes in place (not with those through ``.data``)."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Watch:
    """References that must stay what they were. Asked at every call about thousands: all loops run in C."""

    def __init__(self) -> None:
        self._places: list[Mapping[Any, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._sized: list[Mapping[Any, Any]] = []
        self._sizes: list[int] = []

    def entry(self, place: Mapping[Any, Any], name: str) -> None:
        """Watch one entry of a dictionary; None stands for none."""
        self._places.append(place)
        self._names.append(name)
        self._values.append(place.get(name))

    def size(self, place: Mapping[Any, Any]) -> None:
        """Watch the number of entries of a dictionary."""
        self._sized.append(place)
        self._sizes.append(len(place))

    def holds(self) -> bool:
        """Is all as it was?"""
        found = map(dict.get, self._places, self._names)  # type: ignore[arg-type]
        return all(map(operator.is_, found, self._values)) and list(map(len, self._sized)) == self._sizes


class Stamps:
    """The stamps of many tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]

    def now(self) -> tuple[list[int], list[int]]:
        """Addresses and version counters."""
        return list(map(Tensor.data_ptr, self._tensors)), list(map(_VERSION, self._counted))


_VERSION = operator.attrgetter("_version")


def _peft_kinds() -> tuple[type, ...]:
    """The plain LoRA layers, if peft was imported."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return (layers.Linear, layers.Conv2d) if layers is not None else ()


class Binding:
    """Makes ``ours`` compute with the parameters of ``theirs`` as they are now.

    Args:
        theirs: a diffusers UNet.
        ours: of ``build``; its parameters are replaced.

    ``reason`` says why that cannot be done, or is None. It is found here, once; ``current`` says whether it, and all
    the rest, still holds.
    """

    def __init__(self, theirs: nn.Module, ours: UNet):
        self.ours = ours
        self.reason: str | None = None
        self._same = Watch()
        self._modules: list[nn.Module] = []  # all but the root
        self._kinds: list[Any] = []  # and their classes
        self._forwards: dict[Any, Any] = {}
        self._dropouts: list[nn.Module] = []
        self._loras: list[tuple[Any, nn.Module]] = []  # diffusers' layer, and ours that stands for it
        self._told: tuple[Any, ...] | None = None
        self._adapters, self._added, self._lora_dropouts = Watch(), Stamps(()), list[nn.Module]()
        self._added_then = self._added.now()
        self.merged = 0  # layers whose weights hold LoRA adapters
        try:
            modules = self._watch(theirs)
            self._share(modules)
        except LeftAlone as why:
            self.reason = str(why)
        self._fed = Stamps(parameter for layer in self._feeding() for parameter in layer.parameters())

    # -- looking at diffusers' modules

    def _watch(self, theirs: nn.Module) -> dict[str, nn.Module]:
        """Remember what each module is; return them by name, LoRA layers unopened. Raises ``LeftAlone``."""
        found: dict[str, nn.Module] = {}
        problem = None
        # no reference to the root itself is kept, which holds us: it would never be freed
        waiting = [("", theirs)]
        while waiting:
            name, module = waiting.pop()
            found[name] = module
            self._remember(module, root=not name)
            problem = problem or self._problem(name, module)
            inside = () if isinstance(module, _peft_kinds()) else module._modules.items()
            for child_name, child in inside:
                self._same.entry(module._modules, child_name)
                if child is not None:
                    waiting.append((f"{name}.{child_name}" if name else child_name, child))
        if problem:
            raise LeftAlone(problem)
        return found

    def _remember(self, module: nn.Module, root: bool) -> None:
        kind: Any = type(module)
        self._forwards[kind] = kind.forward
        self._same.size(module._modules)
        for name in module._parameters:
            self._same.entry(module._parameters, name)
        if root:
            return
        self._modules.append(module)
        self._kinds.append(kind)
        self._same.size(module._forward_hooks)
        self._same.size(module._forward_pre_hooks)
        own = module.__dict__
        self._same.entry(own, "forward")
        if kind.__name__.endswith(("Block", "Block2D")):
            for name in (*FREEU, "_chunk_size"):
                self._same.entry(own, name)
        if "processor" in own:
            self._same.entry(own, "processor")
        if isinstance(module, nn.modules.dropout._DropoutNd):
            self._same.entry(own, "p")
            if module.p:
                self._dropouts.append(module)

    def _problem(self, name: str, module: nn.Module) -> str | None:
        """Why a module does not do what ours does in its place, if so."""
        kind: Any = type(module)
        own = module.__dict__
        known = kind.__module__.startswith(("diffusers.", "torch.nn.")) and kind.forward.__module__.startswith(
            ("diffusers.", "torch.nn.")
        )
        if not known and not isinstance(module, _peft_kinds()):
            return f"{name or 'the network'} is a {kind.__module__.split('.')[0]} {kind.__name__}"
        if not name:
            return None
        if own.get("forward") is not None:
            return f"the forward of {name} was replaced (by offloading, casting or another library)"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
        processor = own.get("processor", module._modules.get("processor"))
        # of the two that we know, only the older one upcasts where the network asks for it
        plain = type(processor).__name__ == "AttnProcessor" and not own.get("upcast_attention")
        if processor is not None and type(processor).__name__ != "AttnProcessor2_0" and not plain:
            return f"attention processor {type(processor).__name__}"
        if any(own.get(key) is not None for key in FREEU):
            return "FreeU is on"
        if own.get("_chunk_size") is not None:
            return "feed-forward chunking is on"
        return None

    # -- sharing parameters

    def _share(self, modules: dict[str, nn.Module]) -> None:
        left = {name for name, module in modules.items() if module._parameters or isinstance(module, _peft_kinds())}
        mine: Any
        for name, mine in self.ours.named_modules():
            if not mine._parameters:
                continue
            found: Any = modules.get(name)
            if found is None:
                raise LeftAlone(f"it has no {name}")
            if isinstance(found, _peft_kinds()):
                layer: Any = found
                self._loras.append((layer, mine))
                self._remember_base(layer)
                found = layer.base_layer
            self._take(name, mine, found)
            left.discard(name)
        if left:
            raise LeftAlone(f"it has {min(left)}, which is not known")
        dtypes = {parameter.dtype for parameter in self.ours.parameters()}
        if len(dtypes) > 1:
            raise LeftAlone(f"parameters of several types: {', '.join(sorted(map(str, dtypes)))}")

    def _remember_base(self, layer: Any) -> None:
        base = layer.base_layer
        self._same.entry(layer._modules, "base_layer")
        self._remember(base, root=False)
        if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
            raise LeftAlone("a layer under a LoRA has hooks")

    @staticmethod
    def _take(name: str, mine: Any, found: nn.Module) -> None:
        if type(found).__name__ not in PLAIN:
            raise LeftAlone(f"{name} is a {type(found).__name__}")
        wanted = {key for key, value in mine._parameters.items() if value is not None}
        for key, value in found._parameters.items():
            if (value is not None) != (key in wanted):
                raise LeftAlone(f"{name}.{key} is {'unknown' if value is not None else 'missing'}")
            if value is None:
                continue
            if type(value) is not nn.Parameter or value.layout != torch.strided:  # quantised, or distributed
                raise LeftAlone(f"{name}.{key} is a {type(value).__name__}")
            if value.shape != mine._parameters[key].shape:
                raise LeftAlone(f"{name}.{key} is {list(value.shape)}, not {list(mine._parameters[key].shape)}")
            mine._parameters[key] = value

    # -- asked at every call

    def current(self) -> bool:
        """Are all modules and parameters still those that were seen?"""
        return (
            self._same.holds()
            and list(map(type, self._modules)) == self._kinds
            and all(kind.forward is forward for kind, forward in self._forwards.items())
        )

    def dropping(self) -> bool:
        """Is any dropout at work?"""
        return any(module.training for module in self._dropouts)

    def follow_loras(self, scale: float, always: bool = False) -> bool:
        """Bring the weights up to date with the adapters that are active; return whether anything was done.

        Args:
            scale: factor of all adapters (``cross_attention_kwargs["scale"]``).
            always: merge anew even where nothing seems to have changed.

        Raises:
            LeftAlone: for adapters that are more than a product of two matrices added to a weight.
        """
        if not self._loras:
            return False
        told = self._lora_settings(scale)
        if not always and told == self._told and self._adapters.holds() and self._added.now() == self._added_then:
            return False
        self._told, self.merged = None, 0
        for layer, _ in self._loras:
            _check(layer)
        self._remember_adapters()
        for layer, mine in self._loras:
            self.merged += _merge(layer, mine, scale)
        self._told = told
        return True

    def _lora_settings(self, scale: float) -> tuple[Any, ...]:
        """What decides which adapters are added, and how much of each."""
        layers = [layer for layer, _ in self._loras]
        return (
            scale,
            [layer.disable_adapters for layer in layers],
            [tuple(layer.merged_adapters) for layer in layers],
            [tuple(layer.active_adapters) for layer in layers],
            [tuple(layer.scaling.items()) for layer in layers],
            [dropout.training for dropout in self._lora_dropouts],
        )

    def _remember_adapters(self) -> None:
        """Watch the tensors that are added, and those they are added to."""
        self._adapters, tensors, self._lora_dropouts = Watch(), [], []
        for layer, _ in self._loras:
            tensors.append(layer.base_layer.weight)
            for name in _active(layer):
                for matrices in (layer.lora_A, layer.lora_B):
                    self._adapters.entry(matrices._modules, name)
                    self._adapters.entry(matrices[name]._parameters, "weight")
                    tensors.append(matrices[name].weight)
                if getattr(layer.lora_dropout[name], "p", 0):
                    self._lora_dropouts.append(layer.lora_dropout[name])
        self._added = Stamps(tensors)
        self._added_then = self._added.now()

    def fed(self) -> tuple[list[int], list[int]]:
        """Stamps of all parameters that feed what is kept between calls."""
        return self._fed.now()

    def _feeding(self) -> Iterator[nn.Module]:
        ours = self.ours
        yield from (m for m in (ours.time_embedding, ours.class_embedding, ours.add_embedding) if m is not None)
        for block in ours.blocks():
            yield from (resnet.time_emb_proj for resnet in block.all_resnets())
        for module in ours.modules():
            if isinstance(module, TokenAttention) and module.crosses:
                yield from (module.to_k, module.to_v)


def _active(layer: Any) -> tuple[str, ...]:
    return tuple(name for name in layer.active_adapters if name in layer.lora_A)


def _check(layer: Any) -> None:
    """Raise ``LeftAlone`` for a layer whose adapters ``_merge`` cannot add."""
    if layer.merged_adapters:
        if layer.disable_adapters:
            raise LeftAlone("merged LoRA adapters are disabled: peft takes them out again")
        return
    for name in () if layer.disable_adapters else _active(layer):
        if name in layer.lora_variant:
            raise LeftAlone(f"LoRA adapter {name!r} is a {type(layer.lora_variant[name]).__name__}")
        if layer.lora_dropout[name].training and getattr(layer.lora_dropout[name], "p", 0):
            raise LeftAlone(f"LoRA adapter {name!r} drops at random")


def _merge(layer: Any, mine: Any, scale: float) -> bool:
    """Give our layer the base weight plus the active adapters, a copy; or the base weight itself where none is active.

    Half precision is summed in float32 and rounded once.
    """
    base, active = layer.base_layer, _active(layer)
    mine._parameters.update(base._parameters)
    if layer.merged_adapters or layer.disable_adapters or not active:
        return False
    dtype = torch.promote_types(base.weight.dtype, torch.float32)
    weight, bias = base.weight.to(dtype), base.bias
    for name in active:
        weight = weight + scale * layer.get_delta_weight(name).to(dtype)
        more = layer.lora_B[name].bias
        if more is not None:
            more = scale * layer.scaling[name] * more
            bias = more if bias is None else bias + more
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    weight = weight.to(base.weight.dtype).contiguous(memory_format=layout)
    mine._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        mine._parameters["bias"] = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
    return True
