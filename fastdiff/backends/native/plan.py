"""A program with memory behind it: what one batch size and image size runs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from fastdiff.backends.program import Program
from fastdiff.kernels.native import Op, Runtime, aligned


class Plan:
    """Ops, their addresses and their memory.

    Args:
        runtime: the compiled library.
        program: what to run.
        weights: what each weight slot points at: a parameter's ``[N, K]``, or prepared weights (``Runtime.pack``).
        threads: how many threads run it.
    """

    def __init__(self, runtime: Runtime, program: Program, weights: Mapping[int, Tensor], threads: int):
        self.runtime, self.program, self.threads = runtime, program, threads
        self.ops = (Op * len(program.ops))(*program.ops)
        self.slots = (ctypes.c_void_p * program.slots)()
        self.kept: list[Tensor] = []  # what the addresses point into
        starts, floats = program.layout()
        self.arena = aligned(floats)
        self.scratch = runtime.scratch(program.ops, threads)
        for slot, start in starts.items():
            self.slots[slot] = self.arena.data_ptr() + 4 * start
        for slot, weight in weights.items():
            self._keep(slot, weight)
        for slot, parts in program.vectors.items():
            self._keep(slot, (parts[0] if len(parts) == 1 else torch.cat(parts)).detach().contiguous())
        self.behind: dict[str, list[tuple[int, int]]] = {}  # aliases of what each call brings
        names = {slot: name for name, slot in program.external.items()}
        for slot in program.alias:
            base, offset = program.resolved(slot)
            if base in names:
                self.behind.setdefault(names[base], []).append((slot, 4 * offset))
            else:
                self.slots[slot] = self.slots[base] + 4 * offset

    def _keep(self, slot: int, tensor: Tensor) -> None:
        self.kept.append(tensor)
        self.slots[slot] = tensor.data_ptr()

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Point the externals at this call's tensors, which must live until ``run`` returns."""
        for name, tensor in tensors.items():
            if name not in self.program.external:  # keys that a cut network does not read
                continue
            address = tensor.data_ptr()
            self.slots[self.program.external[name]] = address
            for slot, offset in self.behind.get(name, ()):
                self.slots[slot] = address + offset

    def run(self) -> None:
        """Run every op."""
        self.runtime.run(self.ops, len(self.ops), self.slots, self.scratch.data_ptr(), self.threads, None)

    def profile(self) -> list[float]:
        """Run every op and return the seconds that each took."""
        seconds = (ctypes.c_double * len(self.ops))()
        self.runtime.run(self.ops, len(self.ops), self.slots, self.scratch.data_ptr(), self.threads, seconds)
        return list(seconds)
