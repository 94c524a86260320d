"""Our UNet on the parameters of a diffusers UNet: what is shared, what is watched, and LoRA.

Nothing is copied: our modules hold the very ``Parameter`` objects of diffusers' modules. So whatever changes a
parameter in place, or through its ``.data`` (``pipe.to``, ``load_state_dict``, ``fuse_lora``), is followed without
being noticed. What replaces a parameter or a module, or changes what a module does, is noticed by ``Binding.current``,
which is asked at every call: it compares a few thousand references, well under a millisecond.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError
from fastdiff.models.config import CONDITIONAL, UNCONDITIONAL, UNetConfig
from fastdiff.models.unet import TokenAttention, UNet

PLAIN = {"Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding", "LoRACompatibleLinear", "LoRACompatibleConv"}
PROCESSORS = {"AttnProcessor2_0", "AttnProcessor"}  # plain softmax attention
FREEU = ("s1", "s2", "b1", "b2")


class LeftAlone(Exception):
    """Why diffusers' own forward is to run."""


def is_unet(module: object) -> bool:
    """Is this one of the two networks that we know, unchanged?"""
    kind = type(module)
    return kind.__name__ in (CONDITIONAL, UNCONDITIONAL) and kind.__module__.startswith("diffusers.")


def build(theirs: nn.Module) -> UNet:
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
        self.ours, self.reason = ours, None
        self._same: list[tuple[Mapping[str, Any], str, Any]] = []  # what must stay the same object
        self._sizes: list[tuple[Mapping[str, Any], int]] = []  # what must stay as long as it is
        self._kinds: list[tuple[nn.Module, type]] = []
        self._forwards: dict[type, Any] = {}
        self._dropouts: list[nn.Module] = []
        self._loras: list[tuple[nn.Module, nn.Module]] = []  # diffusers' layer, and ours that stands for it
        self._lora_state: list[Any] | None = None
        self.merged = 0  # layers whose weights hold LoRA adapters
        try:
            modules = self._watch(theirs)
            self._share(modules)
        except LeftAlone as why:
            self.reason = str(why)
        self._fed = [parameter for layer in self._feeding() for parameter in layer.parameters()]

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
                self._same.append((module._modules, child_name, child))
                if child is not None:
                    waiting.append((f"{name}.{child_name}" if name else child_name, child))
        if problem:
            raise LeftAlone(problem)
        return found

    def _remember(self, module: nn.Module, root: bool) -> None:
        kind = type(module)
        self._forwards[kind] = kind.forward
        self._sizes.append((module._modules, len(module._modules)))
        self._same += [(module._parameters, name, value) for name, value in module._parameters.items()]
        if root:
            return
        self._kinds.append((module, kind))
        self._sizes += [(hooks, len(hooks)) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        own = module.__dict__
        self._same.append((own, "forward", own.get("forward")))
        if "Block" in kind.__name__:
            self._same += [(own, name, own.get(name)) for name in (*FREEU, "_chunk_size")]
        if "processor" in own:
            self._same.append((own, "processor", own["processor"]))
        if isinstance(module, nn.modules.dropout._DropoutNd):
            self._same.append((own, "p", own["p"]))
            if module.p:
                self._dropouts.append(module)

    def _problem(self, name: str, module: nn.Module) -> str | None:
        """Why a module does not do what ours does in its place, if so."""
        kind, own = type(module), module.__dict__
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
        if "processor" in own and type(own["processor"]).__name__ not in PROCESSORS:
            return f"attention processor {type(own['processor']).__name__}"
        if isinstance(own.get("processor", module._modules.get("processor")), nn.Module):
            return f"attention processor {type(module.processor).__name__}"
        if any(own.get(key) is not None for key in FREEU):
            return "FreeU is on"
        if own.get("_chunk_size") is not None:
            return "feed-forward chunking is on"
        return None

    # -- sharing parameters

    def _share(self, modules: dict[str, nn.Module]) -> None:
        left = {name for name, module in modules.items() if module._parameters or isinstance(module, _peft_kinds())}
        for name, mine in self.ours.named_modules():
            if not mine._parameters:
                continue
            found = modules.get(name)
            if found is None:
                raise LeftAlone(f"it has no {name}")
            if isinstance(found, _peft_kinds()):
                self._loras.append((found, mine))
                self._remember_base(found)
                found = found.base_layer
            self._take(name, mine, found)
            left.discard(name)
        if left:
            raise LeftAlone(f"it has {min(left)}, which is not known")
        dtypes = {parameter.dtype for parameter in self.ours.parameters()}
        if len(dtypes) > 1:
            raise LeftAlone(f"parameters of several types: {', '.join(sorted(map(str, dtypes)))}")

    def _remember_base(self, layer: nn.Module) -> None:
        base = layer.base_layer
        self._same.append((layer._modules, "base_layer", base))
        self._remember(base, root=False)
        if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
            raise LeftAlone("a layer under a LoRA has hooks")

    @staticmethod
    def _take(name: str, mine: nn.Module, found: nn.Module) -> None:
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
            all(values.get(name) is value for values, name, value in self._same)
            and all(len(values) == size for values, size in self._sizes)
            and all(type(module) is kind for module, kind in self._kinds)
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
        state = [scale, *(_lora_state(layer) for layer, _ in self._loras)]
        if state == self._lora_state and not always:
            return False
        self._lora_state, self.merged = None, 0
        for layer, mine in self._loras:
            self.merged += _merge(layer, mine, scale)
        self._lora_state = state
        return True

    def fed(self) -> list[tuple[int, int]]:
        """Stamps of all parameters that feed what is kept between calls."""
        return [stamp(parameter) for parameter in self._fed]

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


def _lora_state(layer: Any) -> tuple[Any, ...]:
    """A value that changes with whatever decides what a LoRA layer adds."""
    active = _active(layer)
    told = tuple((name, layer.scaling[name], layer.lora_dropout[name].training) for name in active)
    tensors = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in active]
    return (
        bool(layer.disable_adapters), tuple(layer.merged_adapters), told,
        tuple(stamp(tensor) for tensor in (layer.base_layer.weight, *tensors)),
    )  # fmt: skip


def _merge(layer: Any, mine: nn.Module, scale: float) -> bool:
    """Give our layer the base weight plus the active adapters, a copy; or the base weight itself where none is active.

    Half precision is summed in float32 and rounded once.
    """
    base, active, merged = layer.base_layer, _active(layer), bool(layer.merged_adapters)
    if merged and layer.disable_adapters:
        raise LeftAlone("merged LoRA adapters are disabled: peft takes them out again")
    mine._parameters.update(base._parameters)
    if merged or layer.disable_adapters or not active:
        return False
    weight, bias = base.weight.float(), base.bias
    for name in active:
        if name in layer.lora_variant:
            raise LeftAlone(f"LoRA adapter {name!r} is a {type(layer.lora_variant[name]).__name__}")
        dropout = layer.lora_dropout[name]
        if dropout.training and getattr(dropout, "p", 0):
            raise LeftAlone(f"LoRA adapter {name!r} drops at random")
        weight = weight + scale * layer.get_delta_weight(name).float()
        more = layer.lora_B[name].bias
        if more is not None:
            more = scale * layer.scaling[name] * more
            bias = more if bias is None else bias + more
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    mine._parameters["weight"] = nn.Parameter(
        weight.to(base.weight.dtype).contiguous(memory_format=layout), requires_grad=False
    )
    if bias is not None:
        mine._parameters["bias"] = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
    return True
