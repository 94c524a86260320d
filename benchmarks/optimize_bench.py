"""``fastdiff.optimize`` against diffusers: SD 1.5's UNet with random weights on the CPU, interleaved evaluations.

Each of the two runs in a process of its own, whose peak memory is read from the system; the parent asks them in turn,
so that both see the same machine. ``python -m fastdiff.benchmarks.optimize_bench [--quick]`` prints the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.benchmarks.environment import environment, median, relative_error
from fastdiff.benchmarks.layouts import SD15, scaled

PEERS = ("diffusers", "fastdiff")
TOKENS = 77


class Size(NamedTuple):
    """What is measured."""

    divisor: int  # of all widths of SD 1.5
    latents: int
    rounds: int
    batch: int = 2  # guidance
    threads: int = 2


# one thread: two wait for each other wherever another process holds a core
QUICK, FULL = Size(4, 32, 5, threads=1), Size(1, 64, 3)


def measure(quick: bool = False) -> dict[str, Any]:
    """Measure both, interleaved.

    Args:
        quick: widths divided by 4 and a quarter of the pixels (seconds); else the whole network (minutes, 9 GB).

    Returns:
        Medians in seconds, their ratio (diffusers over fastdiff: above 1 is faster) and the ratio of every round; peak
        memory in bytes and its ratio (fastdiff over diffusers); ``error``, the largest difference of the outputs over
        the largest output; what it was measured on.
    """
    size = QUICK if quick else FULL
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        files = {peer: str(Path(folder) / f"{peer}.pt") for peer in PEERS}
        children = {peer: _start(peer, size, files[peer]) for peer in PEERS}
        try:
            for step in range(size.rounds + 1):
                # the first evaluation of each is not counted; who goes first alternates
                for peer in PEERS if step % 2 else PEERS[::-1]:
                    took = _ask(children[peer], "step")["seconds"]
                    if step:
                        seconds[peer].append(took)
            told = {peer: _ask(children[peer], "end") for peer in PEERS}
        finally:
            for child in children.values():
                child.kill()
                child.communicate()
        outputs = {peer: torch.load(file, weights_only=True) for peer, file in files.items()}
    middle = {peer: median(values) for peer, values in seconds.items()}
    return {
        "size": size._asdict(),
        "seconds": middle,
        "ratio": middle["diffusers"] / middle["fastdiff"],
        "ratios": [a / b for a, b in zip(seconds["diffusers"], seconds["fastdiff"], strict=True)],
        "peak_bytes": {peer: told[peer]["peak_bytes"] for peer in PEERS},
        "memory_ratio": told["fastdiff"]["peak_bytes"] / told["diffusers"]["peak_bytes"],
        "error": relative_error(outputs["fastdiff"], outputs["diffusers"].double()),
        "calls": told["fastdiff"]["calls"],
        "environment": environment(torch.device("cpu")),
    }


def _start(peer: str, size: Size, file: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastdiff.benchmarks.optimize_bench", "--child", peer, file, json.dumps(size)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(child: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(what + "\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise RuntimeError(f"the child that was asked for {what!r} ended with {child.wait()}")
    result: dict[str, Any] = json.loads(answer)
    return result


# -- the child


def random_unet(config: dict[str, Any]) -> Any:
    """Diffusers' network of a config with small random weights, filled in place: no initialisation is run."""
    import diffusers

    with torch.device("meta"):
        unet = getattr(diffusers, config["_class_name"]).from_config(config)
    unet = unet.to_empty(device="cpu").eval()
    draw = torch.Generator().manual_seed(0)
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                parameter.data.fill_(float(name == "weight"))
            else:
                bound = (3 / max(1, parameter[0].numel())) ** 0.5
                parameter.data.uniform_(-bound, bound, generator=draw)
    return unet


def _child(peer: str, file: str, size: Size) -> None:
    torch.set_num_threads(size.threads)
    config = scaled(SD15, size.divisor)
    unet = random_unet(config)
    if peer == "fastdiff":
        import fastdiff

        fastdiff.optimize(SimpleNamespace(components={"unet": unet}))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(size.batch, 4, size.latents, size.latents, generator=draw)
    tokens = torch.randn(size.batch, TOKENS, config["cross_attention_dim"], generator=draw)
    times, result = iter(range(981, 0, -20)), x
    for line in sys.stdin:
        if line.strip() == "step":
            seconds, result = _step(unet, x, next(times), tokens)
            print(json.dumps({"seconds": seconds}), flush=True)
        else:
            torch.save(result, file)
            calls = getattr(unet.forward, "calls", 0)
            print(json.dumps({"peak_bytes": _peak_bytes(), "calls": calls}), flush=True)


@torch.no_grad()
def _step(unet: Any, x: Tensor, timestep: int, tokens: Tensor) -> tuple[float, Tensor]:
    """One evaluation as a pipeline makes it, and its wall-clock seconds."""
    start = time.perf_counter()
    result: Tensor = unet(x, torch.tensor(timestep), encoder_hidden_states=tokens, return_dict=False)[0]
    return time.perf_counter() - start, result


def _peak_bytes() -> int:
    """The most memory that this process ever had resident. Linux alone tells it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a scaled-down network, in seconds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        peer, file, size = arguments.child
        _child(peer, file, Size(*json.loads(size)))
    else:
        print(json.dumps(measure(arguments.quick), indent=2))


if __name__ == "__main__":
    main()
