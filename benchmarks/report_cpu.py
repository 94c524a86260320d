"""The tables and the plot of docs/CPU.md, from the committed results of check-cpu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYOUTS = {
    "ddpm-cifar": "DDPM CIFAR-10 layout (35.7 M)",
    "sd15": "Stable Diffusion 1.5 (860 M)",
    "digits": "bundled digits (3.1 M)",
}


def machine(results: dict[str, Any]) -> str:
    """What the figures were measured on, in one line."""
    facts, rate = results["environment"], results["cases"][0]["matrix_gflops"]
    versions = ", ".join(
        f"{name} {facts['versions'][name]}"
        for name in ("torch", "diffusers", "onnxruntime", "openvino")
        if name in facts["versions"]
    )
    return (
        f"{facts['cpu']}, {facts['threads']} threads, {' '.join(facts['flags'])}; {rate:.0f} GFLOP/s in a float32 "
        f"matrix product; {versions}; `{results['command']}`, {facts['date']}."
    )


def runtimes(results: dict[str, Any]) -> str:
    """Every runtime in every case: a time is never without its error."""
    lines = [
        "| network | batch | runtime | ms | of diffusers' | relative error | DDIM-20, ms | of diffusers' |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in results["cases"]:
        for row in case["rows"]:
            whole = f"{row['ddim_ms']:.0f} | {row['ddim_ratio']:.2f}" if "ddim_ms" in row else "|"
            lines.append(
                f"| {LAYOUTS[case['layout']]}, {case['size']}x{case['size']} | {case['batch']} | {row['runtime']} "
                f"| {row['ms']:.1f} | {row['ratio']:.2f} | {row['error']:.0e} | {whole} |"
            )
    return "\n".join([*lines, "", machine(results)])


def summary(results: dict[str, Any]) -> str:
    """One line for each case: ours beside diffusers and the best of the others."""
    lines = [
        "| one UNet evaluation, float32 | batch | ms | of diffusers' time | of the best other's | relative error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in results["cases"]:
        (row,) = (row for row in case["rows"] if row["runtime"] == "fastdiff")
        lines.append(
            f"| {LAYOUTS[case['layout']]}, {case['size']}x{case['size']} | {case['batch']} | {row['ms']:.1f} "
            f"| {row['ratio']:.2f} | {row['ratio_to_best_other']:.2f} ({row['best_other']}) | {row['error']:.0e} |"
        )
    peers = list(dict.fromkeys(row["runtime"] for case in results["cases"] for row in case["rows"]))
    return "\n".join([*lines, "", f"Measured together: {', '.join(peers)}. {machine(results)}"])


def bars(results: dict[str, Any]) -> str:
    """What was asked for and what was measured."""
    lines = ["| asked for | measured | bound | met |", "| --- | ---: | ---: | --- |"]
    for bar in results["bars"]:
        lines.append(f"| {bar['bar']} | {bar['value']} | {bar['bound']} | {'yes' if bar['ok'] else 'no'} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], file: Path) -> None:
    """Time per image by batch, and per pixel by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    batches, sizes = results["curves"]["by_batch"], results["curves"]["by_size"]
    left.plot([p["batch"] for p in batches], [p["per"] for p in batches], "o-")
    left.set(xscale="log", xlabel="batch, at 32x32", ylabel="milliseconds per image", title="By batch", ylim=(0, None))
    left.set_xticks([p["batch"] for p in batches], [str(p["batch"]) for p in batches])
    left.minorticks_off()
    right.plot([p["size"] for p in sizes], [p["per"] for p in sizes], "o-")
    right.set(xlabel="pixels a side, batch 1", ylabel="microseconds per pixel", title="By size", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle("One evaluation of the bundled network on the CPU")
    temporary = file.with_name(f".{file.name}.part")
    figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    temporary.replace(file)


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {"runtimes": runtimes, "bars": bars}
