"""``UNet.trunk`` as a plan for each shape that it meets."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.eager import Prepared, UNetNetwork
from fastdiff.backends.lower import Shape, keys_of, lower
from fastdiff.backends.native.choose import Choice, Layer, by_rule, candidates, choose, signature
from fastdiff.backends.native.measured import time_op
from fastdiff.backends.native.plan import Plan
from fastdiff.backends.program import Program, Weight
from fastdiff.backends.times import Times, add_times, read_times, table_file
from fastdiff.errors import PlanError
from fastdiff.kernels.native import CONV, Op, Runtime, cpu_name, source_hash
from fastdiff.models.unet import TokenPair, UNet
from fastdiff.sampling.denoiser import Cond

LEAST_BUDGET, SHARE = 256 << 20, 0.2  # bytes of prepared weights that are always allowed; or this share of all weights
PLANS = 8  # shapes that are kept ready
MEASURE = "FASTDIFF_MEASURE"  # "0": choose by rule, the same on every machine


class Given(NamedTuple):
    """The arguments of one call of ``UNet.trunk``."""

    x: Tensor
    time_rows: Tensor
    contexts: Sequence[TokenPair] = ()
    control: Sequence[Tensor] = ()
    branch: int | None = None  # see ``lower.Shape``
    deep: Tensor | None = None

    def first(self) -> Given:
        """Those of the batch's first image."""
        contexts = [(k[:1], v[:1]) for k, v in self.contexts]
        return Given(self.x[:1], self.time_rows[:1], contexts, [more[:1] for more in self.control])

    def laid_out(self) -> tuple[Given, Shape]:
        """As a plan reads them: pixels channels-last, keys and values alike; and their shape."""
        contexts = []
        for k, v in self.contexts:
            alike = k.shape == v.shape and k.stride() == v.stride() and k.stride(3) == 1
            contexts.append((k, v) if alike else (k.contiguous(), v.contiguous()))
        x, *control = (t.contiguous(memory_format=torch.channels_last) for t in (self.x, *self.control))
        deep = None if self.deep is None else self.deep.contiguous(memory_format=torch.channels_last)
        keys = tuple(keys_of(i, k) for i, (k, _) in enumerate(contexts))
        shape = Shape(
            tuple(x.shape), tuple(self.time_rows.shape), keys, tuple(tuple(more.shape) for more in control),
            self.branch, None if deep is None else tuple(deep.shape),
        )  # fmt: skip
        return Given(x, self.time_rows.contiguous(), contexts, control, self.branch, deep), shape

    def named(self) -> dict[str, Tensor]:
        """By the names of a program's externals."""
        named = {"x": self.x, "rows": self.time_rows}
        for i, (k, v) in enumerate(self.contexts):
            named |= {f"keys{i}": k, f"values{i}": v}
        named |= {f"control{i}": more for i, more in enumerate(self.control)}
        return named if self.deep is None else named | {"deep": self.deep}


class NativeTrunk:
    """``UNet.trunk`` for float32 on a CPU. Calls may come from several threads; they take turns.

    Weights are read where they are; what had to be joined or prepared is made again by ``refresh``.

    Args:
        unet: in float32, channels-last, on the CPU.
        never_slower: measure plain torch too, once for each image size, and use it where it is faster.

    Raises:
        Unavailable: if the runtime cannot be had here.
    """

    def __init__(self, unet: UNet, never_slower: bool = False):
        self.runtime, self.unet, self.never_slower = Runtime(), unet, never_slower
        self._lock = threading.RLock()
        self._plans: OrderedDict[tuple[Shape, int], Plan | None] = OrderedDict()
        self._choices: dict[tuple[int, ...], list[Choice] | None] = {}
        self._weights: dict[tuple[int, ...], tuple[Weight, Tensor]] = {}
        self._stamp: Any = None

    def __call__(
        self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair] = (), control: Sequence[Tensor] = ()
    ) -> Tensor:
        """See ``UNet.trunk``; what a plan does not know (gradients, other types) goes there."""
        differentiated = torch.is_grad_enabled() and (x.requires_grad or time_rows.requires_grad)
        if differentiated or x.dtype != torch.float32 or x.device.type != "cpu":
            return self.unet.trunk(x, time_rows, contexts, control)
        found = self._found(Given(x, time_rows, contexts, control))
        return self.unet.trunk(x, time_rows, contexts, control) if found is None else found["out"]

    def parted(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], branch: int) -> tuple[Tensor, Tensor]:
        """See ``UNet.parted``."""
        found = self._found(Given(x, time_rows, contexts, branch=branch))
        return self.unet.parted(x, time_rows, contexts, branch) if found is None else (found["out"], found["deep"])

    def shallow(self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair], branch: int, deep: Tensor) -> Tensor:
        """See ``UNet.shallow``."""
        found = self._found(Given(x, time_rows, contexts, (), branch, deep))
        return self.unet.shallow(x, time_rows, contexts, branch, deep) if found is None else found["out"]

    def _found(self, given: Given) -> dict[str, Tensor] | None:
        """What a plan gives, by name; None where plain torch is faster."""
        given, shape = given.laid_out()
        with self._lock:
            plan = self._plan(given, shape)
            return None if plan is None else self._run(plan, given)

    def _run(self, plan: Plan, given: Given) -> dict[str, Tensor]:
        batch, _, height, width = given.x.shape
        sizes = {"out": (batch, self.unet.config.out_channels, height, width)}
        for name, value in plan.program.results.items():
            sizes[name] = (batch, value.channels, value.height, value.width)
        found = {name: torch.empty(size, memory_format=torch.channels_last) for name, size in sizes.items()}
        plan.bind(given.named() | found)
        plan.run()
        return found

    def profile(
        self, x: Tensor, time_rows: Tensor, contexts: Sequence[TokenPair] = (), *, rounds: int = 7
    ) -> tuple[list[Op], list[list[float]]]:
        """The ops of a call, and the seconds that each took in each of ``rounds`` runs.

        Raises:
            PlanError: if plain torch runs this shape.
        """
        given, shape = Given(x, time_rows, contexts).laid_out()
        with self._lock:
            plan = self._plan(given, shape)
            if plan is None:
                raise PlanError("plain torch is faster for this shape, so there is no plan to profile")
            out = self._run(plan, given)  # what the ops write to: it has to outlive them
            runs = [plan.profile() for _ in range(rounds)]
            del out
            return list(plan.ops), [list(times) for times in zip(*runs, strict=True)]

    def refresh(self, always: bool = False) -> None:
        """Follow parameters that were changed in place or replaced. Call it before a run, not at every step.

        Args:
            always: make all copies again, even where torch has counted no change (one through ``.data``, say).
        """
        stamp = [(p.data_ptr(), None if p.is_inference() else p._version) for p in self.unet.parameters()]
        counted = all(version is not None for _, version in stamp)
        with self._lock:
            if always or not counted or stamp != self._stamp:
                self._stamp = stamp
                self._plans.clear()
                self._weights.clear()

    # --- plans ------------------------------------------------------------------------------------------------------

    def _plan(self, given: Given, shape: Shape) -> Plan | None:
        """The plan of a shape; None where plain torch is faster."""
        if self._stamp is None:
            self.refresh()
        threads = torch.get_num_threads()
        key = shape, threads
        if key not in self._plans:
            program = lower(self.unet, shape)  # first of all: it refuses what does not fit
            size = *shape.x[2:], threads
            if size not in self._choices:
                self._choices[size] = self._choose(*given.first().laid_out())
            choices = self._choices[size]
            self._plans[key] = None if choices is None else self._made(program, picked(program, choices))
            while len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _made(self, program: Program, choices: Sequence[Choice]) -> Plan:
        program.hand_out()
        weights = {}
        for op, choice in zip(products(program), choices, strict=True):
            op.algorithm, op.packed = choice
            weights[op.weight] = self._weight(op, program.weights[op.weight], choice)
        return Plan(self.runtime, program, weights, torch.get_num_threads())

    def _weight(self, op: Op, weight: Weight, choice: Choice) -> Tensor:
        """A layer's weights as its choice reads them; copies are shared by all plans."""
        key = (choice.algorithm if choice.packed else -1, *(id(part) for part in weight.parts))
        if key not in self._weights:
            matrix = weight.matrix()
            made = self.runtime.pack(op, matrix, torch.get_num_threads()) if choice.packed else matrix
            self._weights[key] = weight, made
        return self._weights[key][1]

    # --- choices ----------------------------------------------------------------------------------------------------

    def _choose(self, given: Given, shape: Shape) -> list[Choice] | None:
        """What each layer runs with at this image size; None where plain torch is faster as a whole."""
        program = lower(self.unet, shape)
        layers = [self._layer(op) for op in products(program)]
        if os.environ.get(MEASURE) == "0":
            return [by_rule(layer, op.H, op.W) for layer, op in zip(layers, products(program), strict=True)]
        file = table_file(cpu_name(), source_hash(), torch.__version__, torch.get_num_threads())
        times = read_times(file)
        new = self._measured(program, layers, times, given)
        if new:
            times |= add_times(file, new)
        parameters = 4 * sum(p.numel() for p in self.unet.parameters())
        choices = choose(layers, times, max(LEAST_BUDGET, int(SHARE * parameters)))
        name = f"whole network {parameters} bytes {len(layers)} layers {shape.x[2]}x{shape.x[3]}"
        if self.never_slower and name not in times:
            times |= add_times(file, {name: self._whole(self._made(program, choices), given)})
        slower = self.never_slower and times[name]["eager"] < times[name]["native"]
        return None if slower else choices

    def _layer(self, op: Op) -> Layer:
        sizes = {}
        for choice in candidates(op, self.runtime.width):
            trial = Op.from_buffer_copy(op)
            trial.algorithm = choice.algorithm
            sizes[choice] = 4 * self.runtime.packed_floats(trial) if choice.packed else 0
        return Layer(signature(op), sizes)

    def _measured(self, program: Program, layers: Sequence[Layer], known: Times, given: Given) -> Times:
        """Times that ``known`` lacks, each op in place, with the weights and the memory of the real plan."""
        wanted = {
            layer.signature: (op, layer)
            for op, layer in zip(products(program), layers, strict=True)
            if any(choice.name not in known.get(layer.signature, {}) for choice in layer.bytes)
        }
        new: Times = {}
        if not wanted:
            return new
        threads = torch.get_num_threads()
        plan = self._made(program, [Choice()] * len(layers))
        out = self._run(plan, given)  # what the ops below write to: it has to outlive them
        for name, (op, layer) in wanted.items():
            new[name], best, address = {}, float("inf"), plan.slots[op.weight]
            matrix = program.weights[op.weight].matrix()
            for choice in layer.bytes:
                trial = Op.from_buffer_copy(op)
                trial.algorithm, trial.packed = choice
                prepared = self.runtime.pack(trial, matrix, threads) if choice.packed else None
                plan.slots[op.weight] = address if prepared is None else prepared.data_ptr()
                seconds = time_op(self.runtime, trial, plan.slots, threads, 1.5 * best)
                new[name][choice.name], best = seconds, min(best, seconds)
            plan.slots[op.weight] = address
        del out
        return new

    def _whole(self, plan: Plan, given: Given) -> dict[str, float]:
        """Seconds of one evaluation here and in plain torch: the least of three, in turns."""
        times = {"native": float("inf"), "eager": float("inf")}
        for _ in range(3):
            begin = time.perf_counter()
            self._run(plan, given)
            between = time.perf_counter()
            self.unet.trunk(given.x, given.time_rows, given.contexts, given.control)
            end = time.perf_counter()
            times = {"native": min(times["native"], between - begin), "eager": min(times["eager"], end - between)}
        return times

    def chosen(self) -> dict[str, dict[str, str]]:
        """For each image size met: each kind of layer, and what it runs with."""
        report = {}
        for (height, width, threads), choices in self._choices.items():
            name = f"{height}x{width}, {threads} threads"
            shapes = [shape for shape, _ in self._plans if shape.x[2:] == (height, width) and shape.branch is None]
            if choices is None or not shapes:
                report[name] = {"all": "plain torch, which was faster" if choices is None else "not in memory now"}
                continue
            ops = products(lower(self.unet, shapes[0]))
            report[name] = {signature(op): choice.name for op, choice in zip(ops, choices, strict=True)}
        return report


def products(program: Program) -> list[Op]:
    """The ops that there is something to choose for."""
    return [op for op in program.ops if op.kind == CONV]


def picked(program: Program, choices: list[Choice]) -> list[Choice]:
    """Those of the whole network's choices that belong to a program, which may lack the layers below a cut."""
    if program.cut is None:
        return choices
    above = sum(op.kind == CONV for op in program.ops[program.cut :])
    return choices[: len(products(program)) - above] + choices[len(choices) - above :]


class NativeNetwork(UNetNetwork):
    """A ``UNetNetwork`` whose trunk is a plan; see ``NativeTrunk``."""

    trunk: NativeTrunk

    def __init__(self, unet: UNet, never_slower: bool = False):
        trunk = NativeTrunk(unet, never_slower)
        super().__init__(unet, trunk, trunk.parted, trunk.shallow)

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``."""
        self.trunk.refresh()
        return super().prepare(cond, times)
