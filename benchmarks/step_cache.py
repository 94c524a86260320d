"""What step caching costs in quality and gains in time, beside the other way to save time: fewer steps.

``python -m fastdiff.benchmarks.step_cache --out FILE`` draws digits with the bundled model, all arms in turns for the
time, and judges them; times an evaluation of DDPM's layout for CIFAR-10, whole and cut; and counts what share of the
operations of Stable Diffusion's layouts is left above each skip connection. With ``--rounds 0`` or ``--samples 0`` it
measures the other thing alone, and FILE keeps what it had.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.backends.in_memory import network_of
from fastdiff.backends.lossy import in_turns
from fastdiff.benchmarks.calls import MODEL
from fastdiff.benchmarks.environment import environment, median, rms_error, write_json
from fastdiff.benchmarks.layouts import DDPM_CIFAR, SD15, SDXL
from fastdiff.benchmarks.table import Arm, draw_many, fastdiff_arm, judged, time_arms
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import read_json
from fastdiff.models.unet import UNet
from fastdiff.pipeline import Pipeline
from fastdiff.sampling.denoiser import Cond

# sampler, steps: fewer steps without caching, and intervals and branches with it
CASES = {
    ("dpmpp_2m", 20): ((14, 10, 7), ((2, 0), (2, 2), (2, 4), (3, 0))),
    ("ddim", 50): ((25, 17, 10), ((2, 0), (3, 0), (5, 0), (3, 3))),
}
BATCH = 4
COUNTED = {"sd15": (SD15, 64), "sdxl": (SDXL, 128), "ddpm-cifar": (DDPM_CIFAR, 32)}


def arms(pipe: Pipeline, sampler: str, steps: int) -> dict[str, Arm]:
    """Without caching, with fewer steps, and with caching."""
    fewer, settings = CASES[sampler, steps]
    found = {f"{sampler} {n} steps": fastdiff_arm(pipe, "auto", sampler, n) for n in (steps, *fewer)}
    for interval, branch in settings:
        told = {"cache_interval": interval, "cache_branch_id": branch}
        name = f"{sampler} {steps} steps, interval {interval}, branch {branch}"
        found[name] = fastdiff_arm(partial(pipe, **told), "auto", sampler, steps)
    return found


def times(found: dict[str, Arm], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each arm, and their ratio to the first one's."""
    taken = [median(arm) for arm in time_arms(list(found.values()), BATCH, rounds, "time")]
    return {
        name: {"ms": round(ms, 2), "time_over_none": round(ms / taken[0], 4)}
        for name, ms in zip(found, taken, strict=True)
    }


def qualities(found: dict[str, Arm], samples: int) -> dict[str, dict[str, Any]]:
    """Of each arm the error against the first one from the same noise, and how good its digits are."""
    drawn = {name: draw_many(arm, samples) for name, arm in found.items()}
    whole, _ = next(iter(drawn.values()))
    return {
        name: {"error": rms_error(images, whole)} | judged(images, asked) for name, (images, asked) in drawn.items()
    }


def evaluation(rounds: int) -> dict[str, Any]:
    """One evaluation of DDPM's layout for CIFAR-10 with random weights: whole, and above some skip connections."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_dict(DDPM_CIFAR)).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    network = network_of(unet)
    prepared = network.prepare(Cond(), torch.tensor([[[500.0, 500.0]]]))
    x, index = torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    runs = {"whole": lambda: network(x, index, prepared)}
    for branch in (0, 2, 3, 6):
        deep = network.parted(x, index, prepared, branch)[1]
        runs[f"branch {branch}"] = partial(network.shallow, x, index, prepared, branch, deep)
    for run in runs.values():
        run()
    taken = in_turns(runs, rounds)
    return {name: {"ms": round(ms, 3), "over_whole": round(ms / taken["whole"], 4)} for name, ms in taken.items()}


def operations(layout: dict[str, Any], size: int) -> dict[str, float]:
    """The share of a network's operations that runs above each skip connection; nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        unet = UNet(UNetConfig.from_dict(layout))
        config = unet.config
        tokens = torch.empty(1, 77, config.cross_attention_dim) if config.conditional else None
        contexts = [] if tokens is None else unet.contexts(tokens)
        given = torch.empty(1, config.in_channels, size, size), torch.empty(1, unet.row_width()), contexts
        whole = _flops(partial(unet.trunk, *given))
        shares = {}
        for branch in range(len(unet.skips)):
            deep: Tensor = unet.parted(*given, branch)[1]
            shares[str(branch)] = round(_flops(partial(unet.shallow, *given, branch, deep)) / whole, 4)
    return shares


def _flops(run: partial[Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m fastdiff.benchmarks.step_cache``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=500, help="images that are judged (default: 500)")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing (default: 9)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = read_json(options.out) if options.out.exists() else {"digits": {}}
    result |= {"command": "python -m fastdiff.benchmarks.step_cache", "environment": environment(), "batch": BATCH}
    pipe = Pipeline.from_pretrained(MODEL)
    with torch.no_grad():
        result["share_of_operations"] = {name: operations(*case) for name, case in COUNTED.items()}
        if options.rounds:
            result["ddpm_cifar_evaluation"] = evaluation(options.rounds)
        for case in CASES:
            found = arms(pipe, *case)
            measured = [times(found, options.rounds)] if options.rounds else []
            measured += [qualities(found, options.samples)] if options.samples else []
            for figures in measured:
                for name, figure in figures.items():
                    result["digits"][name] = result["digits"].get(name, {}) | figure
    write_json(options.out, result)


if __name__ == "__main__":
    main()
