"""From results to what people read: the table, the plot, the picture, and the README's generated parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastdiff.benchmarks import report_calibrate, report_cpu, report_engine, report_samplers
from fastdiff.benchmarks.table import BATCH, PEER
from fastdiff.models.files import write_text
from fastdiff.pipeline import Pipeline

NAMES = {"euler": "Euler", "ddim": "Euler (DDIM)", "dpmpp_2m": "DPM++ 2M", "flow_map": "flow map"}
BEGIN, END = "<!-- generated: {} -->", "<!-- end generated: {} -->"


def markdown_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, fastest last within each backend."""
    lines = [
        f"| backend | sampler | steps | ms/image (batch 1) | vs {PEER} | images/s (batch {BATCH}) | vs {PEER} "
        "| class recognised | Frechet distance |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in results["arms"]:
        ratio = arm["latency_ratio"]
        lines.append(
            f"| {arm['backend']} | {NAMES[arm['sampler']]} | {arm['steps']} | {arm['ms_batch_1']:.1f} "
            f"| {1 / ratio:.1f}x | {arm['images_per_second']:.1f} | {arm['throughput_ratio']:.1f}x "
            f"| {100 * arm['accuracy']:.1f} % | {arm['frechet']:.1f} |"
        )
    lines += [f"| {name} | n/a: {why} | | | | | | | |" for name, why in results["missing"].items()]
    machine, samples = results["environment"], results["arms"][0]["samples"]
    lines += [
        "",
        f"Medians of interleaved rounds of one run on {machine['device']}, {machine['threads']} threads, float32, "
        f"torch {machine['versions']['torch']}; guidance {results['guidance_scale']:g} in every row. Quality on "
        f"{samples} images, balanced over the classes; {results['real_to_real_count']} real held-out digits score a "
        f"Frechet distance of {results['real_to_real']:.1f}.",
    ]
    return "\n".join(lines)


def plot(results: dict[str, Any], file: Path) -> None:
    """Latency against Frechet distance, one curve for each backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    backends = list(dict.fromkeys(arm["backend"] for arm in results["arms"]))
    for backend, marker in zip(backends, "*os^Dv", strict=False):
        arms = [arm for arm in results["arms"] if arm["backend"] == backend]
        x, y = [arm["ms_batch_1"] for arm in arms], [arm["frechet"] for arm in arms]
        axes.scatter(x, y, s=160 if backend == PEER else 45, marker=marker, label=backend, zorder=3)
        if backend == backends[-1] or backend == PEER:
            for arm in arms:
                name = f"{NAMES[arm['sampler']]} {arm['steps']}"
                axes.annotate(name, (arm["ms_batch_1"], arm["frechet"]), fontsize=8, xytext=(5, 5),
                              textcoords="offset points")  # fmt: skip
    if results["real_to_real_count"] == results["arms"][0]["samples"]:  # the distance depends on the count
        axes.axhline(results["real_to_real"], color="grey", linestyle=":", label="real held-out digits")
    axes.set(xscale="log", yscale="log", xlabel="milliseconds per image, batch 1 (lower is better)",
             ylabel="Frechet distance (lower is better)",
             title="Latency and quality on the same weights")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    temporary = file.with_name(f".{file.name}.part")
    figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    temporary.replace(file)


def picture(folder: Path, file: Path, steps: tuple[int, ...] = (1, 2, 4), seed: int = 0) -> None:
    """Digits of every class by the flow map, two rows for each number of steps, from the same noise."""
    pipe = Pipeline.from_pretrained(folder)
    labels = list(range(10)) * 2
    rows = [pipe(labels, num_inference_steps=n, seed=seed, output_type="pt").images for n in steps]
    images = torch.cat(rows)[:, 0]
    height, width = images.shape[1:]
    sheet = images.view(-1, 10, height, width).permute(0, 2, 1, 3).reshape(-1, 10 * width)
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    temporary = file.with_name(f".{file.name}.part")
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(temporary, format="PNG")
    temporary.replace(file)


def write_report(results: dict[str, Any], out: Path, folder: Path) -> str:
    """Write results.json, table.md, plot.png and samples.png; return the table."""
    out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(results)
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "table.md", table + "\n")
    plot(results, out / "plot.png")
    picture(folder, out / "samples.png")
    return table


def fill(text: str, name: str, content: str) -> str:
    """Replace the generated part ``name`` of a document."""
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> None:
    """Regenerate the tables of the README and of the pages under docs/ from the committed results."""
    root = Path(__file__).resolve().parents[1]
    results = json.loads((root / "benchmarks/results/main.json").read_text(encoding="utf-8"))
    readme = root / "README.md"
    write_text(readme, fill(readme.read_text(encoding="utf-8"), "table", markdown_table(results)))
    plot(results, root / "docs/plot.png")
    cpu = json.loads((root / "benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    write_text(readme, fill(readme.read_text(encoding="utf-8"), "cpu", report_cpu.summary(cpu)))
    report_cpu.plot(cpu, root / "docs/cpu.png")
    pages = (
        ("samplers", "SAMPLERS", report_samplers),
        ("cpu", "CPU", report_cpu),
        ("engine", "SERVING", report_engine),
        ("calibrate", "CALIBRATION", report_calibrate),
    )
    for name, page, report in pages:
        found = json.loads((root / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        text = (root / f"docs/{page}.md").read_text(encoding="utf-8")
        for part, table in report.PARTS.items():
            text = fill(text, part, table(found))
        write_text(root / f"docs/{page}.md", text)
    calibrated = json.loads((root / "benchmarks/results/calibrate.json").read_text(encoding="utf-8"))
    report_calibrate.plot(calibrated, root / "docs/calibration.png")


if __name__ == "__main__":
    main()
