"""``optimize``, ``restore`` and ``summary``: a diffusers pipeline whose UNet runs in our code, with the same calls.

Only one attribute of one object is set: ``pipe.unet.forward``, on the instance. The parameters are shared, in
channels-last layout. A call that ours does not handle runs in diffusers' own forward (on these weights: equal within
rounding), and is counted with its reason.

What is kept between calls, and when it is made anew:

- keys and values of the text, for the two latest ``encoder_hidden_states`` tensors, as long as these live: made anew
  for another tensor, one changed in place, a change of a weight that feeds them, and where time goes back up (a new
  run; on a GPU times are not read, for that would stop it);
- the time projections of the latest time, for evaluations that repeat it;
- weights with LoRA adapters added, copies of the touched layers alone: made anew when adapters, their scales or their
  tensors change, and at every new run.

A change through ``.data`` in place is not visible to torch's version counter: what is shared follows it at once, what
is kept follows it at the next run.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.backends.flat import FlatTrunk
from fastdiff.backends.native import NativeTrunk
from fastdiff.errors import PlanError
from fastdiff.integrations.binding import Binding, LeftAlone, Stamps, build, is_unet, stamp
from fastdiff.integrations.exported import exported_trunk
from fastdiff.kernels import CPU, REFERENCE, Ops, triton_ops
from fastdiff.kernels.native import Unavailable
from fastdiff.models.config import CONDITIONAL
from fastdiff.models.unet import TokenPair, UNet

Pipe = TypeVar("Pipe")
EXPORTED = "onnxruntime"
RUNS = 2  # conditioning tensors remembered: guidance may alternate between two
PLAIN_ARGUMENTS = ("sample", "timestep", "class_labels", "return_dict")
ARGUMENTS = (
    "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask",
    "cross_attention_kwargs", "added_cond_kwargs", "down_block_additional_residuals", "mid_block_additional_residual",
    "down_intrablock_additional_residuals", "encoder_attention_mask", "return_dict",
)  # fmt: skip
NOT_OURS = {  # arguments that no code of ours reads: they must be None
    "attention_mask": "attention_mask",
    "encoder_attention_mask": "encoder_attention_mask",
    "down_intrablock_additional_residuals": "T2I-adapter residuals",
}


def optimize(pipe: Pipe, backend: str = "auto", artifact: str | os.PathLike[str] | None = None) -> Pipe:
    """Let a diffusers pipeline run its UNet in our code: same calls, same callbacks, same LoRA calls, faster.

    Every component that is a ``UNet2DModel`` or ``UNet2DConditionModel`` which we know gets a new ``forward``, and its
    weights are put in channels-last layout, in place. All else is left alone; ``summary`` says what and why. Call it
    before ``enable_model_cpu_offload`` or ``torch.compile``. Calling it twice is harmless.

    Args:
        pipe: a diffusers pipeline.
        backend: ``"auto"``, or ``"onnxruntime"``: what runs at every step is then the graph in ``artifact``, made by
            ``fastdiff export`` of this UNet. While LoRA adapters are active, or after a weight changed, the calls are
            left to diffusers.
        artifact: the exported file.

    Returns:
        The same pipeline.

    Raises:
        PlanError: if ``pipe`` has no components, or the options do not fit.
        ArtifactError: if the file is damaged, or does not compute what the UNet does; nothing was changed then.
        BackendError: if onnxruntime cannot run it here.
    """
    if backend not in ("auto", EXPORTED) or (backend == EXPORTED) != (artifact is not None):
        raise PlanError(
            f"backend is {backend!r} and artifact {artifact!r}; allowed: 'auto' alone, {EXPORTED!r} with one"
        )
    found = [component for component in _components(pipe).values() if _why_left_alone(component) is None]
    if artifact is not None and len(found) != 1:
        raise PlanError(f"{len(found)} components can be sped up; an exported file is for exactly one")
    for component in found:
        trunk = None if artifact is None else exported_trunk(Path(artifact), component)
        _install(component, trunk)
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Undo ``optimize``: diffusers' own forward, and the weights in the layout that they had. Returns the pipeline.

    Raises:
        PlanError: if ``pipe`` has no components.
    """
    for component in _components(pipe).values():
        faster = _faster(component)
        if faster is not None:
            faster.remove(component)
    return pipe


def summary(pipe: object) -> str:
    """Tell, component by component, what is sped up, what is left alone and why, and the calls so far.

    Raises:
        PlanError: if ``pipe`` has no components.
    """
    lines = [f"{type(pipe).__name__}:"]
    for name, component in _components(pipe).items():
        if component is None:
            continue
        head = f"  {name} ({type(component).__name__}): "
        faster = _faster(component)
        if faster is not None:
            lines += [head + faster.state(), *(f"    {line}" for line in faster.counts())]
        else:
            lines.append(head + f"left alone: {_why_left_alone(component) or 'fastdiff.optimize was not called'}")
    return "\n".join(lines)


def _components(pipe: object) -> dict[str, Any]:
    found = getattr(pipe, "components", None)
    if not isinstance(found, Mapping):
        raise PlanError(f"optimize takes a diffusers pipeline, which has components; got {type(pipe).__name__}")
    return dict(found)


def _faster(component: object) -> Faster | None:
    """What ``optimize`` put into a component, also where offloading was wrapped around it since."""
    own = getattr(component, "__dict__", {})
    for name in ("forward", "_old_forward"):
        if isinstance(own.get(name), Faster) and own[name].enabled:
            return own[name]  # type: ignore[no-any-return]
    return None


def _why_left_alone(component: object) -> str | None:
    """Why ``optimize`` does not touch a component, or None where it does."""
    if not isinstance(component, nn.Module):
        return "not a network"
    if hasattr(component, "_orig_mod"):
        return "compiled by torch.compile, which has its own idea of speed"
    if not is_unet(component):
        return "only UNet2DModel and UNet2DConditionModel are sped up"
    if _faster(component) is not None:
        return "already sped up"
    if "forward" in component.__dict__:
        return "its forward was replaced before (by offloading or another library); call fastdiff.optimize first"
    if component._compiled_call_impl is not None:
        return "compiled by torch.compile, which has its own idea of speed"
    if getattr(component, "quantization_method", None) or getattr(component, "is_quantized", False):
        return "quantised"
    try:
        ours = build(component)
    except LeftAlone as why:
        return str(why)
    return Binding(component, ours).reason


def _install(unet: Any, exported: Callable[..., Tensor] | None = None) -> None:
    changed = []
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
                # one at a time, so that no second copy of the network ever exists
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
                changed.append(weakref.ref(parameter))
    unet.forward = Faster(unet, changed, exported)


class _Run:
    """What belongs to one tensor of conditioning: keys and values, and the latest time rows."""

    def __init__(self, tokens: Tensor, contexts: Sequence[TokenPair]):
        self.tokens, self.stamp, self.contexts = weakref.ref(tokens), _identity(tokens), contexts
        self.time: float | None = None
        self.told: list[Any] = []
        self.rows: Tensor | None = None

    def of(self, tokens: Tensor) -> bool:
        return self.tokens() is tokens and self.stamp == _identity(tokens) and not tokens.is_inference()

    def rows_for(self, time: float | None, told: Sequence[Tensor | None]) -> Tensor | None:
        """The time rows, if they were made for this time and these tensors as they are now."""
        known = time is not None and time == self.time and len(told) == len(self.told)
        return self.rows if known and all(map(_still, self.told, told)) else None

    def keep(self, time: float | None, told: Sequence[Tensor | None], rows: Tensor) -> None:
        self.time, self.rows = time, rows
        self.told = [None if part is None else (weakref.ref(part), _identity(part)) for part in told]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (*stamp(tensor), tensor.shape, tensor.dtype)


def _still(kept: Any, tensor: Tensor | None) -> bool:
    if kept is None or tensor is None:
        return kept is None and tensor is None
    return kept[0]() is tensor and kept[1] == _identity(tensor) and not tensor.is_inference()


class Faster:
    """The ``forward`` of one diffusers UNet: ours where it can, diffusers' own where it cannot.

    Args:
        unet: a UNet that ``build`` knows. Only a weak reference is kept.
        changed: weak references to the parameters whose layout was changed.
        exported: what runs at every step instead of the trunk.
    """

    def __init__(self, unet: Any, changed: list[Any], exported: Callable[..., Tensor] | None = None):
        self._network, self._changed = weakref.ref(unet), changed
        self._binding = Binding(unet, build(unet))
        self._conditional = type(unet).__name__ == CONDITIONAL
        self._runs: list[_Run] = []
        self._fed: Any = None
        self._ops: dict[str, Ops] = {"cpu": CPU}
        self._planned: dict[str, Callable[..., Tensor]] = {}  # by kind of device
        self._exported, self._weights = exported, Stamps(unet.parameters() if exported else ())
        self._weights_then = self._weights.now()
        self._last = float("inf")  # the time of the last call
        self.enabled = True
        self.calls, self.fallbacks = 0, Counter[str]()
        self.__name__, self.__doc__ = "forward", type(unet).forward.__doc__
        self.__signature__ = inspect.signature(MethodType(type(unet).forward, unet))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied network runs its own, diffusers', forward."""
        unet = self._unet()
        return MethodType(type(unet).forward, memo.get(id(unet), unet))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._unet(), "forward")

    def _unet(self) -> Any:
        return self._network()

    # -- for optimize, restore and summary

    def remove(self, unet: Any) -> None:
        """Put diffusers' forward back, and the layout of the weights."""
        self.enabled = False  # in case that something was wrapped around it
        if unet.__dict__.get("forward") is self:
            del unet.forward
        if unet.__dict__.get("_old_forward") is self:
            unet._old_forward = MethodType(type(unet).forward, unet)
        for reference in self._changed:
            parameter = reference()
            if parameter is not None:
                parameter.data = parameter.data.contiguous(memory_format=torch.contiguous_format)
        self._runs, self._changed = [], []

    def state(self) -> str:
        """What is done now, in a few words."""
        unet = self._unet()
        if self._binding.reason and self._binding.current():
            return f"left alone for now: {self._binding.reason}"
        merged = f", LoRA adapters merged into {self._binding.merged} layers" if self._binding.merged else ""
        kept = "text keys and values kept between steps, " if self._conditional else ""
        where = next(unet.parameters()).device.type
        if self._exported is not None:
            return f"sped up: {kept}steps in onnxruntime"
        fused = ", fused kernels" if where == "cuda" and self._ops.get(where, REFERENCE) is not REFERENCE else ""
        return f"sped up: {kept}channels-last, weights shared{fused}{merged}"

    def counts(self) -> list[str]:
        """Lines of a summary: calls here and calls left to diffusers."""
        lines = [f"{self.calls} calls in fastdiff, {self.fallbacks.total()} left to diffusers"]
        return lines + [f"{count} left to diffusers: {reason}" for reason, count in self.fallbacks.most_common()]

    # -- calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Diffusers' ``forward``, with its arguments."""
        unet = self._unet()
        plain = type(unet).forward
        if not self.enabled or torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return plain(unet, *args, **kwargs)
        try:
            result = self._fast(unet, args, kwargs)
        except LeftAlone as why:
            reason = str(why)
        except Exception as error:  # whatever ours stumbles over is diffusers' to judge: it answers, or raises its own
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self._runs = []
        else:
            self.calls += 1
            return result
        self.fallbacks[reason] += 1
        return _contiguous(plain(unet, *args, **kwargs))

    def _fast(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._given(args, kwargs)
        sample: Tensor = given["sample"]
        binding = self._bound(unet)
        scale = self._accepted(given, sample, binding.ours, args)
        merged = binding.follow_loras(scale)
        if merged:
            self._runs = []
        network = binding.ours
        network.ops = self._kernels(sample.device.type)
        fed = binding.fed()
        if fed != self._fed:
            self._runs, self._fed = [], fed
        time, times = self._times(given["timestep"], sample)
        run = self._known_run(given.get("encoder_hidden_states"), time)
        again = run is None if self._conditional else time is None or time > self._last
        self._last = float("inf") if time is None else time
        if run is None and self._conditional:
            if not merged:  # a change through .data shows here at the latest
                binding.follow_loras(scale, always=True)
            run = self._new_run(network, given["encoder_hidden_states"])
        rows = self._rows(network, run, time, times, given, len(sample))
        control = given.get("down_block_additional_residuals")
        control = () if control is None else (*control, given["mid_block_additional_residual"])
        x = sample.to(memory_format=torch.channels_last)
        result = self._trunk(network, sample, again)(x, rows, () if run is None else run.contexts, control).contiguous()
        return self._output(unet, result) if given.get("return_dict", True) else (result,)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = ARGUMENTS if self._conditional else PLAIN_ARGUMENTS
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or not given.keys() <= set(names) or not {"sample", "timestep"} <= given.keys():
            raise LeftAlone("arguments that forward does not have")
        return given

    def _bound(self, unet: Any) -> Binding:
        """The binding to the network as it is now."""
        if not self._binding.current():
            self._binding, self._runs = Binding(unet, self._binding.ours), []
        if self._binding.reason:
            raise LeftAlone(self._binding.reason)
        if self._binding.dropping():
            raise LeftAlone("dropout is on (the network is in training mode)")
        return self._binding

    def _accepted(self, given: dict[str, Any], sample: Tensor, ours: UNet, args: tuple[Any, ...]) -> float:
        """Raise ``LeftAlone`` for a call that ours does not handle; return the factor of LoRA adapters."""
        weight = ours.conv_in.weight
        if torch.is_grad_enabled():
            raise LeftAlone("gradients are on (call it under torch.no_grad)")
        if torch.is_autocast_enabled(sample.device.type):
            raise LeftAlone("autocast is on")
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            raise LeftAlone("hooks on all modules")
        if type(sample) is not Tensor or sample.dtype != weight.dtype or sample.device != weight.device:
            raise LeftAlone(f"sample is {sample.dtype} on {sample.device}, weights {weight.dtype} on {weight.device}")
        for name, what in NOT_OURS.items():
            if given.get(name) is not None:
                raise LeftAlone(what)
        if not self._conditional:
            if (given.get("class_labels") is None) != (ours.class_embedding is None):
                raise LeftAlone("class_labels given to a network without classes, or missing")
            return 1.0
        down, middle = given.get("down_block_additional_residuals"), given.get("mid_block_additional_residual")
        if (down is None) != (middle is None):
            raise LeftAlone("residuals of the way down or of the middle alone")
        tokens = given.get("encoder_hidden_states")
        if type(tokens) is not Tensor or tokens.dtype != weight.dtype or len(tokens) != len(sample):
            raise LeftAlone("encoder_hidden_states of another type or batch")
        return _lora_scale(given.get("cross_attention_kwargs"), positional=len(args) > 6)

    def _kernels(self, device: str) -> Ops:
        if device not in self._ops:
            try:
                self._ops[device] = triton_ops() if device == "cuda" else REFERENCE
            except ImportError:
                self._ops[device] = REFERENCE
        return self._ops[device]

    def _trunk(self, network: UNet, sample: Tensor, again: bool) -> Callable[..., Tensor]:
        """What runs at every step: a plan of fused ops, where it can be had; ``again``: a run begins."""
        if self._exported is not None:
            if self._binding.merged:
                raise LeftAlone("LoRA adapters are active, which the exported graph does not have")
            if self._weights.now() != self._weights_then:
                raise LeftAlone("weights changed after the exported graph was opened")
            return self._exported
        device = sample.device.type
        if device not in ("cpu", "cuda") or (device == "cpu" and sample.dtype != torch.float32):
            return network.trunk
        if device not in self._planned:
            try:
                kind = NativeTrunk if device == "cpu" else FlatTrunk
                self._planned[device] = kind(network, never_slower=True)
            except Unavailable:
                self._planned[device] = network.trunk
        trunk = self._planned[device]
        if isinstance(trunk, NativeTrunk | FlatTrunk):
            trunk.refresh(again)
        return trunk

    def _times(self, timestep: Any, sample: Tensor) -> tuple[float | None, Tensor]:
        """The time as a number, where the device need not be asked and all images share it, and ``[1 or B]``."""
        if not isinstance(timestep, Tensor):
            whole = not isinstance(timestep, float) or not self._conditional  # UNet2DModel truncates
            value = float(int(timestep) if whole else timestep)
            return value, torch.tensor([timestep], dtype=torch.int64 if whole else torch.float64, device=sample.device)
        times = timestep.reshape(-1) if timestep.dim() == 0 else timestep
        if times.dim() != 1 or len(times) not in (1, len(sample)):
            raise LeftAlone(f"timestep of shape {list(timestep.shape)}")
        number = float(times) if times.device.type == "cpu" and len(times) == 1 else None
        return number, times.to(sample.device)

    def _known_run(self, tokens: Tensor | None, time: float | None) -> _Run | None:
        """What is kept for these tokens, unless a new run starts."""
        self._runs = [run for run in self._runs if run.tokens() is not None]
        for run in self._runs:
            if tokens is not None and run.of(tokens):
                again = time is not None and run.time is not None and time > run.time
                return None if again else run
        return None

    def _new_run(self, network: UNet, tokens: Tensor) -> _Run:
        """Compute keys and values of the text."""
        run = _Run(tokens, network.contexts(tokens))
        self._runs = [*[old for old in self._runs if old.tokens() is not tokens][-(RUNS - 1) :], run]
        return run

    def _rows(
        self, network: UNet, run: _Run | None, time: float | None, times: Tensor, given: dict[str, Any], batch: int
    ) -> Tensor:
        """Time projections ``[B, P]``."""
        added = (given.get("added_cond_kwargs") or {}) if network.add_embedding is not None else {}
        told = [
            given.get("class_labels") if network.class_embedding is not None else None,
            given.get("timestep_cond"), added.get("text_embeds"), added.get("time_ids"),
        ]  # fmt: skip
        rows = None if run is None else run.rows_for(time, told)
        if rows is None:
            labels, strength, text, sizes = told
            embedding = network.embed(times, labels, text_embeds=text, time_ids=sizes, timestep_cond=strength)
            rows = network.time_rows(embedding).expand(batch, -1)
            if run is not None:
                run.keep(time, told, rows)
        return rows

    def _output(self, unet: Any, sample: Tensor) -> Any:
        """What diffusers returns."""
        from diffusers.models.unets import unet_2d, unet_2d_condition

        kind = unet_2d_condition.UNet2DConditionOutput if self._conditional else unet_2d.UNet2DOutput
        return kind(sample=sample)


def _contiguous(result: Any) -> Any:
    """Diffusers' output in the layout that it has with contiguous weights."""
    if isinstance(result, tuple):
        return (result[0].contiguous(), *result[1:])
    result.sample = result.sample.contiguous()
    return result


def _lora_scale(told: Any, *, positional: bool) -> float:
    """The factor in ``cross_attention_kwargs``, if there is nothing else in them."""
    if not told:
        return 1.0
    scale = told.get("scale")
    # given by position, diffusers does not see it; with 0 it resets the adapters' own scales
    if positional or set(told) != {"scale"} or not isinstance(scale, int | float) or not scale:
        raise LeftAlone(f"cross_attention_kwargs: {', '.join(sorted(map(str, told)))}")
    return float(scale)
