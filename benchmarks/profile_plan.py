"""Where the time of a CPU plan goes: ``python -m fastdiff.benchmarks.profile_plan --layout sd15``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence

import torch

from fastdiff.backends.native import NativeTrunk
from fastdiff.benchmarks.layouts import DDPM_CIFAR, SD15
from fastdiff.kernels.native import ATTENTION, CONV, KINDS, Op
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet

LAYOUTS = {"ddpm-cifar": DDPM_CIFAR, "sd15": SD15}


def described(op: Op) -> tuple[str, float]:
    """What an op is, and its floating-point operations, counted directly."""
    if op.kind == CONV:
        sizes = f"k{op.kernel}s{op.stride} {op.H}x{op.W} {op.C0}+{op.C1}>{op.N}{' gated' if op.gated else ''}"
        how = ("direct", "", "winograd2", "", "winograd4")[op.algorithm] + (" packed" if op.packed else "")
        flops = 2.0 * op.B * op.H * op.W * op.N * (1 + op.gated) * (op.C0 + op.C1) * op.kernel**2
        return f"{sizes} {how}", flops
    if op.kind == ATTENTION:
        return f"attention {op.L}x{op.M}", 4.0 * op.B * op.L * op.M * op.N
    return KINDS[op.kind], 0.0


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print each kind of op with its count, milliseconds and GFLOP/s, the slowest first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layout", default="ddpm-cifar", choices=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    unet = UNet(UNetConfig.from_dict(LAYOUTS[options.layout])).eval().to(memory_format=torch.channels_last)
    size, config = unet.config.sample_size or 64, unet.config
    rows = unet.row_width()
    contexts = ()
    if config.conditional:
        contexts = unet.contexts(torch.randn(options.batch, 77, config.cross_attention_dim))
    x = torch.randn(options.batch, config.in_channels, size, size)
    ops, seconds = NativeTrunk(unet).profile(x, torch.randn(options.batch, rows), contexts, rounds=options.rounds)
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for op, times in zip(ops, seconds, strict=True):
        name, flops = described(op)
        kind = found[name]
        kind[0], kind[1], kind[2] = kind[0] + 1, kind[1] + flops, kind[2] + statistics.median(times)
    print(f"{options.layout} batch {options.batch}: {1e3 * sum(entry[2] for entry in found.values()):.1f} ms")
    for name, (count, flops, spent) in sorted(found.items(), key=lambda item: -item[1][2]):
        print(f"{name:48}{count:4.0f}{1e3 * spent:10.2f} ms{flops / 1e9 / max(spent, 1e-9):8.0f} GFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
