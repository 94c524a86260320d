"""The tables and the plot of docs/CALIBRATION.md, from the committed results of check-calibrate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PROBLEMS = ("mixture fitted to Fashion-MNIST", "trained UNet")


def errors(results: dict[str, Any]) -> str:
    """Error at each number of calls, beside the best classical sampler of any library."""
    lines = [
        "| problem | calls | calibrated | best classical | ratio | which that is |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in (name for name in PROBLEMS if name in results):
        for mine in results[name]["calibrated"]:
            rivals = [one for one in results[name]["classical"] if one["budget"] == mine["budget"]]
            best = min(rivals, key=lambda one: one["error"])
            lines.append(
                f"| {name} | {mine['budget']} | {mine['error']:.4f} | {best['error']:.4f} "
                f"| {mine['error'] / best['error']:.2f} | {best['library']}: {best['label']} |"
            )
    trials = sorted(one["ratio"] for one in results["random problems"])
    facts, fitted = results["environment"], results["seconds to calibrate the bundled model"]
    images = results[PROBLEMS[1]]["images"]
    return "\n".join([
        *lines,
        "",
        "Root mean square error relative to the solution, on noise that nothing was fitted to; the classical "
        "sampler is the best of all of ours, diffusers' and k-diffusion's over many grids on that same noise: for the "
        f"UNet, all were tried on {images['all samplers']} images, and the best on {images['the best of them']}. "
        f"{len(trials)} random problems: median ratio {trials[len(trials) // 2]:.2f}, largest {trials[-1]:.2f}. "
        f"Fitting the UNet for {', '.join(map(str, fitted['steps']))} calls took {fitted['seconds'] / 60:.1f} minutes. "
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['versions']['torch']}; "
        f"`{results['command']}`, {facts['date']}.",
    ])  # fmt: skip


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {"errors": errors}


def plot(results: dict[str, Any], file: Path) -> None:
    """Frechet distance against network calls, one curve for each kind of sampler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.2), constrained_layout=True)
    found = results["frechet"]
    for (name, curve), marker in zip(found["curves"].items(), "^*o", strict=True):
        calls = sorted(curve, key=int)
        axes.plot([int(n) for n in calls], [curve[n] for n in calls], marker=marker, markersize=8, label=name)
    axes.set(xscale="log", xlabel="network calls", ylabel=f"Frechet distance of {found['curve images']} digits")
    ticks = sorted({int(n) for curve in found["curves"].values() for n in curve})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.xaxis.set_tick_params(which="minor", bottom=False)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
