"""One UNet evaluation, and a whole DDIM run, in every CPU runtime: same weights, same input, outputs compared.

The runtimes take turns, round by round, each after a pause in which the threads of the one before it go to sleep.
A time stands as a ratio to diffusers' in the same run, beside the error to a float64 run of the same network.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff.benchmarks.environment import environment, relative_error, write_json
from fastdiff.benchmarks.layouts import DDPM_CIFAR, SD15
from fastdiff.benchmarks.runtimes import RUNTIMES, Evaluate, Inputs, installed
from fastdiff.pipeline import resolve

PAUSE = 0.05  # seconds: thread pools spin for a while after their last work
TOKENS = 77
DDIM_STEPS = 20
QUICK = ("diffusers", "channels-last", "onnxruntime", "openvino", "fastdiff")  # those that need no compiling


class Case(NamedTuple):
    """What is measured: a layout and a batch, at the layout's own size unless told."""

    layout: str
    batch: int
    size: int = 0
    ddim: bool = False  # whole runs too

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"{self.layout} batch {self.batch}" + (f" at {self.size}" if self.size else "")


def network_of(layout: str) -> nn.Module:
    """A layout's network with seeded random weights, or the bundled model: diffusers' module in float32."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    if layout == "digits":
        return UNet2DModel.from_pretrained(resolve("digits"), low_cpu_mem_usage=False).eval().requires_grad_(False)
    config = {"ddpm-cifar": DDPM_CIFAR, "sd15": SD15}[layout]
    kind = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}[config["_class_name"]]
    return kind.from_config(config).eval().requires_grad_(False)


def inputs_of(network: nn.Module, case: Case) -> Inputs:
    """Seeded inputs of one evaluation."""
    generator, config = torch.Generator().manual_seed(1), network.config
    size = case.size or config.sample_size
    inputs = {
        "sample": torch.randn(case.batch, config.in_channels, size, size, generator=generator),
        "timestep": torch.tensor(500.0),
    }
    if getattr(config, "cross_attention_dim", None):
        width = config.cross_attention_dim
        inputs["encoder_hidden_states"] = torch.randn(case.batch, TOKENS, width, generator=generator)
    if config.num_class_embeds:
        inputs["class_labels"] = torch.arange(case.batch) % 10
    return inputs


def flops_of(network: nn.Module, inputs: Inputs) -> float:
    """Floating-point operations of one evaluation, convolutions counted directly."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        RUNTIMES["diffusers"](network, inputs, Path())(inputs["sample"], inputs["timestep"])
    return float(counter.get_total_flops())


def matrix_rate() -> float:
    """What the machine gives a float32 matrix product, in operations a second: the best of torch's two libraries."""
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    products = [lambda: a @ b, lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")]
    best = float("inf")
    for _ in range(8):
        for product in products[: 1 + torch.backends.mkldnn.is_available()]:
            begin = time.perf_counter()
            product()
            best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def ddim(run: Evaluate, start: Tensor, layout: str) -> Tensor:
    """Images of 20 steps of diffusers' scheduler: DDIM; for the bundled flow Euler's method, which is DDIM there."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flow = layout == "digits"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(DDIM_STEPS)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(run(x, t.float()), t, x).prev_sample
    crop = 2 if flow else 0
    return (x[..., crop : x.shape[-2] - crop, crop : x.shape[-1] - crop] / 2 + 0.5).clamp(0, 1)


def our_ddim(network: nn.Module, inputs: Inputs, layout: str, folder: Path) -> Any:
    """The same run by the project's own loop, from what diffusers saves or from the bundled model."""
    from fastdiff.pipeline import Pipeline

    labels = inputs["class_labels"].tolist() if "class_labels" in inputs else None
    if layout == "digits":
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(DDIM_STEPS)
        pipe, how = Pipeline.from_pretrained("digits"), {"sampler": "ddim", "sigmas": scheduler.sigmas.tolist()}
    else:
        from diffusers import DDIMPipeline, DDIMScheduler

        DDIMPipeline(network, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "ddim")
        pipe, how = Pipeline.from_pretrained(folder / "ddim"), {"num_inference_steps": DDIM_STEPS}
    count = len(inputs["sample"]) if labels is None else 1
    return lambda start: (
        pipe(labels, latents=start, guidance_scale=1.0, output_type="pt", num_images_per_prompt=count, **how).images
    )


def measure(case: Case, runtimes: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time one case in every runtime.

    Args:
        case: what.
        runtimes: names of ``RUNTIMES``; those that are not installed are left out.
        rounds: interleaved rounds.

    Returns:
        The case, its operations, and a row for each runtime, ready for JSON.
    """
    network = network_of(case.layout)
    inputs = inputs_of(network, case)
    sample, timestep = inputs["sample"], inputs["timestep"]
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        exact = copy.deepcopy(network).double()
        doubled = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
        truth = RUNTIMES["diffusers"](exact, doubled, Path())(doubled["sample"], timestep)
        del exact
        gc.collect()
        runs = {name: RUNTIMES[name](network, inputs, Path(scratch)) for name in runtimes if installed(name)}
        errors = {name: relative_error(run(sample, timestep), truth) for name, run in runs.items()}
        times = _turns({name: lambda run=run: run(sample, timestep) for name, run in runs.items()}, rounds, case.name)
        rows = [_row(name, times, errors) for name in runs]
        if case.ddim:
            whole = {
                name: lambda run=run: ddim(run, sample, case.layout) for name, run in runs.items() if name != "fastdiff"
            }
            if "fastdiff" in runs:
                loop = our_ddim(network, inputs, case.layout, Path(scratch))
                whole["fastdiff"] = lambda: loop(sample)
            first = whole["diffusers"]()
            spent = _turns(whole, max(rounds // 2, 3), f"{case.name} DDIM-{DDIM_STEPS}")
            for row in rows:
                name = row["runtime"]
                row["ddim_ms"] = round(1e3 * statistics.median(spent[name]), 3)
                row["ddim_ratio"] = ratio(spent, name)
                row["ddim_difference"] = relative_error(whole[name](), first)
        flops = flops_of(network, inputs)
    rate = matrix_rate()
    for row in rows:
        row["share_of_matrix_rate"] = round(flops / (row["ms"] / 1e3) / rate, 3)
    return {
        "layout": case.layout, "batch": case.batch, "size": int(sample.shape[-1]), "gflop": round(flops / 1e9, 2),
        "matrix_gflops": round(rate / 1e9, 1), "rounds": rounds, "rows": rows,
    }  # fmt: skip


def _turns(runs: dict[str, Any], rounds: int, label: str) -> dict[str, list[float]]:
    """Seconds of each run in each round; they take turns, and which comes first changes."""
    names = list(runs)
    for name in names:
        runs[name]()
    spent: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=None):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE)
            begin = time.perf_counter()
            runs[name]()
            spent[name].append(time.perf_counter() - begin)
    return spent


def ratio(spent: dict[str, list[float]], name: str, to: str = "diffusers") -> float:
    """The median over rounds of one run's time over another's in the same round."""
    return round(statistics.median(a / b for a, b in zip(spent[name], spent[to], strict=True)), 4)


def _row(name: str, spent: dict[str, list[float]], errors: dict[str, float]) -> dict[str, Any]:
    peers = [other for other in spent if other not in ("diffusers", "fastdiff")]
    best = min(peers, key=lambda other: statistics.median(spent[other]), default="diffusers")
    return {
        "runtime": name, "ms": round(1e3 * statistics.median(spent[name]), 3),
        "ms_least": round(1e3 * min(spent[name]), 3),
        "ratio": ratio(spent, name), "best_other": best, "ratio_to_best_other": ratio(spent, name, best),
        "error": errors[name],
    }  # fmt: skip


def show(result: dict[str, Any]) -> str:
    """A table for people."""
    lines = [
        f"{result['layout']} batch {result['batch']}, {result['size']}x{result['size']}, {result['gflop']} GFLOP, "
        f"matrix rate {result['matrix_gflops']} GFLOP/s, {result['rounds']} rounds",
        f"{'runtime':18}{'ms':>10}{'ratio':>8}{'share':>8}{'error':>10}{'DDIM ms':>10}{'ratio':>8}",
    ]
    for row in result["rows"]:
        whole = f"{row['ddim_ms']:10.1f}{row['ddim_ratio']:8.3f}" if "ddim_ms" in row else ""
        lines.append(
            f"{row['runtime']:18}{row['ms']:10.2f}{row['ratio']:8.3f}{row['share_of_matrix_rate']:8.2f}"
            f"{row['error']:10.1e}{whole}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.peers``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layout", default="ddpm-cifar", choices=["digits", "ddpm-cifar", "sd15"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-ddim", action="store_true", help="single evaluations only")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    options = parser.parse_args(arguments)
    if "diffusers" not in options.runtimes:
        parser.error("--runtimes must name diffusers: the others are measured against it")
    whole = not options.no_ddim and options.layout != "sd15"
    cases = [Case(options.layout, batch, ddim=whole) for batch in options.batch]
    report: dict[str, Any] = {"environment": environment(torch.device("cpu")), "cases": []}
    print(json.dumps(report["environment"]))
    for case in cases:
        report["cases"].append(measure(case, options.runtimes, options.rounds))
        print(show(report["cases"][-1]), flush=True)
    if options.out:
        write_json(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
