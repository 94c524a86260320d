"""Every bar of exported graphs: ``make check-export [QUICK=1]``. One JSON line a bar; exit 1 when any falls short.

Full size means Stable Diffusion 1.5 (860 M parameters, random weights): exported in a process of its own, whose time
and peak memory are taken, then run in onnxruntime beside diffusers' own export of the same network.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.benchmarks import engine_builds, export_safety
from fastdiff.benchmarks.bars import ROOT, Bar, at_most, command, suite
from fastdiff.benchmarks.environment import environment, median
from fastdiff.benchmarks.layouts import SD15, scaled
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import write_text
from fastdiff.models.unet import UNet
from fastdiff.models.weights import Model, ModelInfo, load_unet

MINUTES, MEMORY, FASTER = 3.0, 2.5, 0.95
TESTS = ("tests/test_export.py", "tests/test_export_models.py", "tests/test_export_parts.py", "tests/test_ort.py",
         "tests/test_built.py", "tests/test_built_text.py", "tests/test_built_text_engines.py")  # fmt: skip
DIVISOR = 2  # of the widths in a quick run
SIZES = {"batch": 1, "height": 64, "width": 64, "tokens": 77}


def make_weights(folder: Path, divisor: int) -> int:
    """Write a UNet of Stable Diffusion 1.5's layout with random weights, as diffusers does; return their bytes."""
    from safetensors.torch import save_file

    config = scaled(SD15, divisor)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in UNet(UNetConfig.from_dict(config)).state_dict().items()}
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        wide = shape.numel() // shape[0] if len(shape) > 1 else 0
        plain = torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
        tensors[name] = torch.randn(shape, generator=draw) / wide**0.5 if wide else plain
    folder.mkdir()
    write_text(folder / "config.json", json.dumps(config))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return sum(4 * value.numel() for value in tensors.values())


def export_alone(folder: Path, file: Path) -> dict[str, float]:
    """In a process of its own: export, with parity measured, and say what that took."""
    program = "import sys; from fastdiff.benchmarks.check_export import exported; exported(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(file)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def exported(folder: str, file: str) -> None:
    """What ``export_alone`` runs."""
    from fastdiff.export.onnx import export_unet
    from fastdiff.export.publish import Options

    begin = time.perf_counter()
    unet = load_unet(folder, channels_last=False)
    options = Options(size=(SIZES["height"], SIZES["width"]))  # one shape, like the peer's
    model = Model(unet, ModelInfo(path="scaled_linear", prediction="eps"), Path(folder))
    manifest = export_unet(model, file, options=options)
    seconds = time.perf_counter() - begin
    error = max(case["exported"] for case in manifest.parity.values())
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "bytes": peak, "error": error}))


def theirs(folder: Path, file: Path) -> None:
    """Diffusers' network through torch's own exporter, for one shape, as one does it today."""
    from diffusers import UNet2DConditionModel

    from fastdiff.benchmarks.runtimes import Plain, quiet

    network = UNet2DConditionModel.from_pretrained(folder).eval()
    shape = (1, SIZES["tokens"], network.config.cross_attention_dim)
    names = ("sample", "timestep", "encoder_hidden_states")
    inputs = torch.randn(1, 4, SIZES["height"], SIZES["width"]), torch.tensor(500), torch.randn(shape)
    with quiet(), torch.no_grad():
        torch.onnx.export(
            Plain(network, names), inputs, str(file), dynamo=True, external_data=True, input_names=list(names),
            verbose=False,
        )  # fmt: skip


def evaluation(file: Path) -> Any:
    """One evaluation of a graph in onnxruntime on the CPU, at the shapes of ``SIZES``, as a function of nothing."""
    from fastdiff.backends.ort_session import Runner, open_session

    runner = Runner(open_session(file, torch.device("cpu"), sizes=SIZES), torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    given = {}
    for name, entry in runner.inputs.items():
        shape = [size if isinstance(size, int) else SIZES[size] for size in entry.shape]
        given[name] = torch.randn(shape, generator=draw) if "float" in entry.type else torch.full(shape, 500)
    return lambda: runner(given)


def side_by_side(ours: Path, peer: Path, rounds: int) -> tuple[float, float]:
    """The median seconds of either, in turns."""
    arms = [evaluation(file) for file in (ours, peer)]
    taken: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for i, run in enumerate(arms):
            begin = time.perf_counter()
            run()
            taken[i].append(time.perf_counter() - begin)
    first, second = (median(times[1:]) for times in taken)  # the first run warms up
    return first, second


def full_size(quick: bool, details: dict[str, Any]) -> Iterator[Bar]:
    """Time, memory and error of an export, and the speed of its graph."""
    divisor = DIVISOR if quick else 1
    name = "SD 1.5" if divisor == 1 else f"SD 1.5 at 1/{divisor} of its width"
    with tempfile.TemporaryDirectory() as scratch:
        folder, file, peer = Path(scratch) / "unet", Path(scratch) / "unet.onnx", Path(scratch) / "diffusers.onnx"
        size = make_weights(folder, divisor)
        took = export_alone(folder, file)
        written = sum(path.stat().st_size for path in Path(scratch).glob("unet*onnx*"))
        details |= took | {"layout": name, "weights_bytes": size, "written_bytes": written}
        yield at_most(f"{name}: minutes to export, parity included", took["seconds"] / 60, MINUTES)
        if not quick:  # torch itself, a few hundred MB, is most of what a small export takes
            yield at_most(f"{name}: peak memory of the export over its weights", took["bytes"] / size, MEMORY)
        yield at_most(f"{name}: relative error in onnxruntime", took["error"], 1e-4)
        theirs(folder, peer)
        seconds = side_by_side(file, peer, 5 if quick else 9)
        details |= {"ms": [1000 * s for s in seconds]}
        yield at_most(f"{name}: onnxruntime on our graph over diffusers' export", seconds[0] / seconds[1], FASTER)


def tests() -> Iterator[Bar]:
    """The parts of the suite that are the bars: models and types; files that lead elsewhere; no fallback; folders."""
    for file in TESTS:
        yield suite(f"{file}: exported, checked, measured", file)


def bars(quick: bool, report: dict[str, Any]) -> Iterator[Bar]:
    """All of them."""
    report |= {"environment": environment(torch.device("cpu")), "full_size": {}}
    yield from tests()
    yield from full_size(quick, report["full_size"])
    yield from export_safety.bars(quick, report)
    yield from engine_builds.bars(quick, report)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.check_export``."""
    return command("check-export", __doc__.split("\n")[0], "half the width, fewer rounds", bars, arguments)


if __name__ == "__main__":
    sys.exit(main())
