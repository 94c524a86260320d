"""Ahead-of-time compilation: what a launcher would launch on a chip that is not here, down to machine code.

Run as a program it compiles for one architecture, in a process where Triton compiles instead of interpreting:
``python tests/aot.py ARCHITECTURE INDEX OF DTYPE...``, and prints one JSON line for each.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels import Sums
from fastdiff.kernels.tiles import Chip

SHIPPED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Limits(NamedTuple):
    """What a chip of one compute capability gives: NVIDIA's CUDA programming guide, technical specifications."""

    multiprocessors: int  # of the largest one that is common
    shared: int  # bytes a program may ask for
    shared_in_all: int  # bytes of one multiprocessor, of which each program also costs 1 KiB
    threads: int  # resident on one multiprocessor
    registers: int = 65536  # of one multiprocessor


CHIPS = {
    80: Limits(108, 163 << 10, 164 << 10, 2048),
    86: Limits(84, 99 << 10, 100 << 10, 1536),
    89: Limits(128, 99 << 10, 100 << 10, 1536),
    90: Limits(132, 227 << 10, 228 << 10, 2048),
    120: Limits(170, 99 << 10, 100 << 10, 1536),
}


class Launch(NamedTuple):
    """One launch: the kernel, and what it is given."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]


class Recorder:
    """Stands in for a kernel and keeps what a launcher would launch."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs, grid))


def record(dtype: torch.dtype, architecture: int) -> tuple[list[Launch], set[tuple[str, str, str]]]:
    """Call every launcher on real shapes; return what it would launch on a chip, and which rows of tiles it read."""
    from fastdiff.kernels import add, attention, combine, geglu, group_norm_silu, layer_norm

    launches: list[Launch] = []
    read: set[tuple[str, str, str]] = set()
    for module in (group_norm_silu, layer_norm, geglu, attention, combine, add):
        module.chip_of = lambda *args, **kwargs: Chip(architecture, CHIPS[architecture].multiprocessors)
        find = getattr(module.lookup, "plain", module.lookup)

        def lookup(op: str, shape: str, dtype: torch.dtype, architecture: int, find: Any = find) -> Any:
            read.add((op, shape, "float" if dtype == torch.float32 else "half"))
            return find(op, shape, dtype, architecture)

        lookup.plain = find
        module.lookup = lookup
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
                setattr(module, name, Recorder(kernel, launches))
    for call in calls(dtype):
        call()
    return launches, read


def calls(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Every launcher on the shapes of the field; the tensors have no memory."""
    from fastdiff.kernels.add import add
    from fastdiff.kernels.attention import attention
    from fastdiff.kernels.combine import combine
    from fastdiff.kernels.geglu import geglu
    from fastdiff.kernels.group_norm_silu import group_norm_silu
    from fastdiff.kernels.layer_norm import layer_norm

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        x = torch.empty(shape, device="meta", dtype=kind)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 and shape[1] >= 16 else x

    for channels, size in [(320, 8), (320, 64), (1280, 32), (640, 128), (128, 1024)]:
        x, vector, rows = draw(1, channels, size, size), draw(channels), draw(1, 2 * channels)
        yield lambda x=x, v=vector: group_norm_silu(x, v, v, 32)
        part = draw(1, 2 * channels, size, size)[:, channels:]  # of a joined buffer, as a flat plan calls it
        yield lambda x=part, v=vector: group_norm_silu(x, v, v, 32)
        yield lambda x=part, v=vector, r=rows: group_norm_silu(x, v, v, 32, row=r[:, : v.numel()])
        more = {"scale": rows[:, :channels], "shift": rows[:, channels:], "row": rows[:, :channels]}
        yield lambda x=x, v=vector, m=more: group_norm_silu(x, v, v, 32, **m, residual=x, total=x, silu=False)
    yield lambda: group_norm_silu(draw(1, 16, 64, 64), draw(16), draw(16), 8)  # few lanes
    for channels in (320, 1280):
        x, vector = draw(2, 1024, channels), draw(channels)
        yield lambda x=x, v=vector: layer_norm(x, v, v)
        yield lambda x=x, v=vector: layer_norm(x, v, v, residual=x, total=x)
        yield lambda c=channels: geglu(draw(2, 1024, 8 * c))
        image = torch.empty(2, 32, 32, 2 * channels, device="meta", dtype=dtype)[..., :channels]
        yield lambda x=image, c=channels: add(x.contiguous(), draw(c), x, x)
    for width in (40, 64, 80, 128, 160):
        for L, M in [(4096, 4096), (256, 256), (4096, 77)]:
            q, k = (torch.empty(1, n, 8, width, device="meta", dtype=dtype).transpose(1, 2) for n in (L, M))
            yield lambda q=q, k=k: attention(q, k, k)
    q = torch.empty(1, 1000, 8, 40, device="meta", dtype=dtype).transpose(1, 2)
    yield lambda: attention(q, q, q)  # ragged
    registers = [draw(2, 4, 64, 64, kind=kind) for kind in (torch.float32, dtype, dtype, torch.float32)]
    sums = Sums.of(torch.empty(2, 3, 4, device="meta"), [(0, 1, 2), (0, 2, 3), ()])
    yield lambda: combine(registers, sums, (torch.float32, torch.float32, dtype))


def specialise(value: Any) -> tuple[str, bool]:
    """Return the type that Triton gives an argument, and whether it may assume a multiple of 16."""
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    if isinstance(value, Tensor):
        return names[value.dtype], True
    if value is None or value == 1:
        return "constexpr", False
    return ("fp32", False) if isinstance(value, float) else ("i32", value % 16 == 0)


class Source(NamedTuple):
    """A launch as the compiler sees it; equal sources give equal code."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    aligned: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, launch: Launch) -> Source:
        """What the just-in-time compiler would make of a launch."""
        kernel, args, kwargs, _ = launch
        options = {name: kwargs[name] for name in kwargs if name not in kernel.arg_names}
        constants = {name: kwargs[name] for name in kwargs if name in kernel.arg_names}
        signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "constexpr")
        aligned = {}
        for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            parts = [specialise(part) for part in value] if isinstance(value, tuple) else [specialise(value)]
            signature[name] = tuple(kind for kind, _ in parts) if isinstance(value, tuple) else parts[0][0]
            if signature[name] == "constexpr":
                constants[name] = value
            for index, (_, multiple) in enumerate(parts):
                if multiple:
                    aligned[(place, index) if isinstance(value, tuple) else (place,)] = [["tt.divisibility", 16]]
        return cls(kernel, signature, constants, aligned, options)

    def compile(self, architecture: int) -> Any:
        """Down to machine code."""
        import triton
        from triton.backends.compiler import GPUTarget

        source = triton.compiler.ASTSource(self.kernel, self.signature, constexprs=self.constants, attrs=self.aligned)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=self.options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, to which registers are spilled."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def sources(architecture: int, dtypes: list[torch.dtype]) -> tuple[list[Source], set[tuple[str, str, str]]]:
    """Every different one, and the rows of tiles that they come from."""
    found, rows = {}, set()
    for dtype in dtypes:
        launches, read = record(dtype, architecture)
        rows |= read
        for launch in launches:
            source = Source.of(launch)
            found[repr(source)] = source
    return list(found.values()), rows


def main(architecture: int, index: int, of: int, dtypes: list[torch.dtype]) -> None:
    """Compile every ``of``-th launch from ``index`` on; print the rows, then a line for each launch."""
    every, rows = sources(architecture, dtypes)
    print(json.dumps(sorted(rows)))
    for source in every[index::of]:
        compiled = source.compile(architecture)
        facts = resources(compiled.asm["cubin"]) | {
            "architecture": architecture,
            "kernel": source.kernel.__name__,
            "dtype": str(next(iter(source.signature.values()))),
            "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
            "cooperative": compiled.metadata.launch_cooperative_grid,
            "constants": {
                name: value for name, value in source.constants.items() if isinstance(value, int | str | None)
            },
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    numbers = (int(value) for value in sys.argv[1:4])
    main(*numbers, [SHIPPED[name] for name in sys.argv[4:]])
