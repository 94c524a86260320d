"""What a smaller type, or step caching, would cost and gain: an accuracy report, before anyone switches it on."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.in_memory import network_of
from fastdiff.kernels.native import cpu_flags
from fastdiff.models.unet import UNet

INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
ROUNDS = 5


def lossy_report(unet: UNet, dtype: torch.dtype) -> dict[str, object]:
    """Compare one evaluation in ``dtype`` with float32's, both against float64, on seeded noise at the UNet's own size.

    Args:
        unet: in float32, on the CPU.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        Relative errors (root mean square), milliseconds (medians, taken in turns), and whether the processor multiplies
        this type itself; where it does not, torch converts and the type gains nothing.
    """
    config, generator = unet.config, torch.Generator().manual_seed(0)
    size = config.sample_size or 64
    x = torch.randn(1, config.in_channels, size, size, generator=generator).to(memory_format=torch.channels_last)
    rows = unet.row_width()
    row = torch.randn(1, rows, generator=generator)
    tokens = torch.randn(1, 77, config.cross_attention_dim, generator=generator)

    def evaluation(network: UNet, kind: torch.dtype, trunk: Callable[..., Tensor]) -> Callable[[], Tensor]:
        contexts = network.contexts(tokens.to(kind)) if config.conditional else ()
        return lambda: trunk(x.to(kind), row.to(kind), contexts)

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    with torch.no_grad():
        double = copy.deepcopy(unet).double()
        exact = evaluation(double, torch.float64, double.trunk)()
        plain = network_of(unet.to(memory_format=torch.channels_last))
        smaller = copy.deepcopy(unet).to(dtype, memory_format=torch.channels_last)
        runs = {
            "float32": evaluation(unet, torch.float32, plain.trunk),
            str(dtype).removeprefix("torch."): evaluation(smaller, dtype, smaller.trunk),
        }
        errors = {name: error(run()) for name, run in runs.items()}
        spent = in_turns(runs, ROUNDS)
    native = sorted(set(INSTRUCTIONS.get(dtype, ())) & cpu_flags())
    return {
        "relative_error": errors,
        "milliseconds": {name: round(times, 3) for name, times in spent.items()},
        "instructions": native,
    }


def in_turns(runs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Milliseconds of each run: the median of so many rounds, in which the runs take turns. Call each once before."""
    spent: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            spent[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in spent.items()}


def caching_report(
    draw: Callable[[int, int], Tensor], settings: Sequence[tuple[int, int]], rounds: int = ROUNDS
) -> list[dict[str, float]]:
    """Compare samples drawn with step caching with those drawn without it, from the same noise.

    Args:
        draw: samples for a ``cache_interval`` and a ``cache_branch_id``, the same ones whenever it is called.
        settings: of these two, what to report on.
        rounds: of the timing, in which all settings take turns.

    Returns:
        For each setting: the relative error (root mean square), the largest difference, milliseconds and their ratio
        to those without caching.
    """
    runs = {setting: (lambda setting=setting: draw(*setting)) for setting in dict.fromkeys([(1, 0), *settings])}
    samples = {setting: run() for setting, run in runs.items()}
    spent, exact = in_turns(runs, rounds), samples[1, 0].double()
    report = []
    for interval, branch in settings:
        apart = samples[interval, branch].double() - exact
        report.append(
            {
                "cache_interval": interval,
                "cache_branch_id": branch,
                "relative_error": float(apart.norm() / exact.norm()),
                "largest_difference": float(apart.abs().max()),
                "milliseconds": round(spent[interval, branch], 3),
                "time_over_none": round(spent[interval, branch] / spent[1, 0], 4),
            }
        )
    return report
