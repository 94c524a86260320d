"""``make check-unets``: measure every bar of the models afresh, one JSON line each; exit 1 if any falls short.

With ``--quick`` fewer files are spoiled and the speed is measured on a smaller network. ``--weights`` and ``--cifar``
name the trained tiny autoencoder and the pictures of its round trip, which are not ours to ship. ``--out`` writes the
details.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.benchmarks import optimize_bench
from fastdiff.benchmarks.autoencoder_quality import round_trip
from fastdiff.benchmarks.bars import Bar, at_least, at_most, show, suite
from fastdiff.benchmarks.environment import environment, write_json
from fastdiff.benchmarks.fuzz_files import LIMIT_BYTES, LIMIT_S, fuzz
from fastdiff.benchmarks.layouts import LAYOUTS, PARAMETERS, SD15, scaled
from fastdiff.benchmarks.unet_parity import RELATIVE, asked, error, inputs, relative_error
from fastdiff.models.config import UNetConfig
from fastdiff.models.lora import Lora, LoraSet, read_lora
from fastdiff.models.unet import UNet
from fastdiff.models.weights import load_strictly

Details = dict[str, Any]
PSNR_DB = 24.94  # published beside the weights of taef2
RANK = 32


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on the meta device and give it random weights of no particular meaning."""
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        wide = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.data.normal_(std=wide**-0.5 if wide > 1 else 0.1, generator=generator)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def parity_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """The published layouts, scaled down and in full size, and drawn configs."""
    errors = {name: error(scaled(config, 8), size=(32, 32)) for name, config in LAYOUTS.items()}
    details["parity"] = errors
    for name, value in errors.items():
        yield at_most(f"{name}, an eighth of its widths: relative difference to diffusers", value, RELATIVE)
    yield suite("drawn configs, odd sizes, control residuals, refusals",
                "tests/test_unet_layouts.py", "tests/test_unet.py", "tests/test_controlnet.py")  # fmt: skip
    for name, wanted in PARAMETERS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in UNet(UNetConfig.from_dict(LAYOUTS[name])).parameters())
        yield Bar(f"{name}: parameters", count, f"= {wanted}", count == wanted)
    yield full_size()


def full_size() -> Bar:
    """One evaluation of the whole Stable Diffusion 1.5 network, on the same tensors."""
    import diffusers

    theirs = empty(lambda: diffusers.UNet2DConditionModel.from_config(SD15))
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(SD15))
    load_strictly(ours, theirs.state_dict(), "diffusers")
    given = inputs(ours.config, batch=1, size=(32, 32), tokens=77)
    difference = relative_error(ours.eval()(**given), asked(theirs, given))
    return at_most("SD 1.5 in full size, 32x32: relative difference to diffusers", difference, RELATIVE)


def pipeline_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """Whole pipelines, files and adapters, by their tests."""
    yield suite(
        "pipelines equal diffusers': text, picture, inpainting, ControlNet, LoRA", "tests/test_text_to_image.py"
    )
    yield suite("optimize, restore, summary", "tests/test_optimize.py")
    yield suite("LoRA layouts, single files", "tests/test_lora.py", "tests/test_single_file.py")


def _adapter(network: nn.Module, seed: int) -> Lora:
    """A LoRA of every attention and feed-forward layer."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in network.named_modules():
        if "transformer_blocks" in name and isinstance(layer, nn.Linear):
            flat = "lora_unet_" + name.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = torch.randn(RANK, layer.in_features, generator=draw).half()
            tensors[f"{flat}.lora_up.weight"] = torch.randn(layer.out_features, RANK, generator=draw).half()
            tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    return read_lora(tensors)


def lora_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """How long a swap of adapters takes on the SD 1.5 network."""
    network = empty(lambda: UNet(UNetConfig.from_dict(SD15))).half().to(memory_format=torch.channels_last)
    loras = LoraSet({"unet": network})
    for i, name in enumerate("ab"):
        loras.load(name, _adapter(network, i))
    spent = []
    for i in range(5 if quick else 11):
        start = time.perf_counter()
        loras.set({"ab"[i % 2]: 0.8})
        spent.append(time.perf_counter() - start)
    details["LoRA swap, seconds"] = spent
    yield at_most(f"LoRA of rank {RANK} swapped in SD 1.5, float16: seconds (median)", statistics.median(spent), 1.0)


def autoencoder_bars(quick: bool, details: Details, weights: Path | None, cifar: Path | None) -> Iterator[Bar]:
    """The autoencoders' parity by their tests, and the round trip of real pictures through trained weights."""
    yield suite(
        "autoencoders equal diffusers', tiles",
        "tests/test_autoencoder.py",
        "tests/test_tiny_autoencoder.py",
        "-k",
        "not taef2 and not real",
    )
    name = "trained tiny autoencoder: PSNR of the round trip, dB"
    if weights is None or cifar is None:
        yield Bar(name, "not measured: give WEIGHTS and CIFAR", f"{PSNR_DB} +- 0.01", False)
        return
    found = details["round trip"] = round_trip(weights, cifar)
    value = round(found["psnr_db"], 3)
    yield Bar(name, value, f"{PSNR_DB} +- 0.01", abs(value - PSNR_DB) <= 0.01)


def speed_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """``fastdiff.optimize`` beside diffusers, interleaved, on the CPU."""
    found = details["optimize"] = optimize_bench.measure(quick)
    shown = f"1/{found['size']['divisor']} of the widths" if found["size"]["divisor"] > 1 else "full size"
    yield at_least(f"optimize, SD 1.5 in {shown}: diffusers' time over ours", found["ratio"], 1.0)
    yield at_most("optimize: relative difference of the outputs", found["error"], RELATIVE)
    yield at_most("optimize: peak memory over diffusers'", found["memory_ratio"], 1.1)


def file_bars(quick: bool, details: Details) -> Iterator[Bar]:
    """Spoiled files: loaded right or refused in one line, never a crash."""
    with tempfile.TemporaryDirectory() as place:
        found = fuzz(2000 if quick else 10_000, 0, Path(place))
    details["spoiled files"] = found
    count = found["count"]
    yield at_most(f"{count} spoiled files: crashes", found["crashes"], 0)
    yield at_most(f"{count} spoiled files: neither loaded right nor refused by name", len(found["failures"]), 0)
    yield at_most("spoiled files: slowest load, seconds of CPU", found["slowest"]["seconds"], LIMIT_S)
    yield at_most("spoiled files: most memory over the file, bytes", found["largest"]["bytes_over"], LIMIT_BYTES)


def main() -> int:
    """Print every bar as it is measured."""
    families = {
        "parity": parity_bars, "pipelines": pipeline_bars, "lora": lora_bars, "autoencoder": autoencoder_bars,
        "speed": speed_bars, "files": file_bars,
    }  # fmt: skip
    parser = argparse.ArgumentParser(prog="python -m fastdiff.benchmarks.check_unets", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer files, a smaller network for the speed")
    parser.add_argument("--only", choices=families, action="append", help="measure this family of bars alone")
    parser.add_argument("--weights", type=Path, help="folder with taef2_encoder and taef2_decoder .safetensors")
    parser.add_argument("--cifar", type=Path, help=".npz with test_images [N, 32, 32, 3]")
    parser.add_argument("--out", type=Path, help="write the details here, as JSON")
    options = parser.parse_args()
    details: Details = {"environment": environment(torch.device("cpu")), "quick": options.quick}

    def bars() -> Iterator[Bar]:
        for name in options.only or families:
            more = (options.weights, options.cifar) if name == "autoencoder" else ()
            yield from families[name](options.quick, details, *more)

    code = show(bars())
    if options.out:
        write_json(options.out, details)
    return code


if __name__ == "__main__":
    sys.exit(main())
