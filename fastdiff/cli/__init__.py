"""The command line: ``fastdiff generate | batch | serve | calibrate | export | build | bench | train | inspect``.

Exit codes: 0 done, 1 failed, 2 wrong usage. Every deliberate error is one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastdiff.backends import BACKENDS
from fastdiff.cli import batch, build, calibrate, export, generate, serve
from fastdiff.cli.common import DTYPES, show
from fastdiff.errors import BackendError, FastdiffError, PlanError
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import read_json
from fastdiff.models.weights import ModelInfo, fingerprint, load_model
from fastdiff.pipeline import Pipeline, resolve
from fastdiff.sampling import PATHS
from fastdiff.training import LOSSES, TrainConfig, Trainer, load_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        if options.threads is not None:
            if options.threads < 1:
                raise PlanError(f"--threads is {options.threads}; allowed: 1 or more")
            torch.set_num_threads(options.threads)
        result: int = options.run(options)
        return result
    except BackendError as error:
        print(f"fastdiff: {error}", file=sys.stderr)
        return 1
    except FastdiffError as error:
        print(f"fastdiff: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fastdiff: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="fastdiff", description="Run trained diffusion UNets, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--threads", type=int, help="CPU threads to use (default: torch's own choice)")
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    model = argparse.ArgumentParser(add_help=False, parents=[shared])
    model.add_argument("--model", default="digits", help="model folder, or a bundled name (default: digits)")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, parent: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[parent])
        command.set_defaults(run=run)
        return command

    generate.add_options(add("generate", generate.generate, "Generate images and write them as PNG files.", model))
    batch.add_options(add("batch", batch.batch, "Draw a table of labels or prompts, on one machine or many.", model))
    serve.add_options(add("serve", serve.serve, "Serve a model over HTTP, with the images API clients know.", model))
    calibrate.add_options(
        add("calibrate", calibrate.run, "Fit samplers of a few steps to a model, beside the classical ones.", model)
    )
    export.add_options(add("export", export.export, "Export the network, or a whole sampler, to ONNX.", model))
    build.add_options(add("build", build.build, "Make a folder that runs in production, or a model repository.", model))
    _bench_options(add("bench", bench, "Measure latency and quality beside the peers, in one run.", model))
    _train_options(add("train", train, "Train a UNet; resumes from its folder's checkpoint.", shared))
    command = add("inspect", inspect, "Show what a model folder or an exported file is.", shared)
    command.add_argument("target", nargs="?", default="digits", help="model folder, bundled name, or .onnx file")
    command.add_argument(
        "--dtype", default="float32", choices=sorted(DTYPES),
        help="also report what this type costs in accuracy and gains in time on this CPU",
    )  # fmt: skip
    command.add_argument(
        "--cache-interval", type=int, nargs="+", default=[], metavar="N",
        help="also report what step caching at these intervals costs in accuracy and gains in time on this CPU",
    )  # fmt: skip
    command.add_argument(
        "--cache-branch-id", type=int, nargs="+", default=[0], metavar="I", help="with these branches (default: 0)"
    )
    command.add_argument("--steps", type=int, default=20, metavar="N", help="steps of that report (default: 20)")
    return parser


def _bench_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--samples", type=int, default=5000, help="images for each quality figure (default: 5000)")
    add("--rounds", type=int, default=15, help="interleaved rounds of the timing (default: 15)")
    every = sorted(BACKENDS.keys() - {"auto"})  # which is one of the others
    add("--backends", nargs="+", default=every, choices=every)
    add(
        "--out",
        type=Path,
        default=Path("out"),
        help="folder for results.json, table.md, plot.png, samples.png",
    )
    add("--data", type=Path, help="mnist.npz: also compare samples with their nearest training images")


def bench(options: argparse.Namespace) -> int:
    """``fastdiff bench``."""
    try:
        from fastdiff.benchmarks.report import write_report
        from fastdiff.benchmarks.table import run_table
    except ImportError as error:
        raise BackendError(f"bench needs {error.name}: pip install 'fastdiff[bench]'") from error
    if options.samples < 200 or options.samples % 10:
        raise PlanError(f"--samples is {options.samples}; allowed: a multiple of 10, 200 or more")
    if options.rounds < 1:
        raise PlanError(f"--rounds is {options.rounds}; allowed: 1 or more")
    results = run_table(resolve(options.model), options.samples, options.rounds, options.backends, options.data)
    table = write_report(results, options.out, resolve(options.model))
    show(
        options,
        results,
        f"{table}\n\nWritten to {options.out}: results.json, table.md, plot.png, samples.png",
    )
    return 0


def _train_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    usual = TrainConfig()
    add("--data", type=Path, required=True, help=".npz with train_images (uint8) and train_labels")
    add("--out", type=Path, required=True, help="folder for checkpoint, log and model")
    add("--config", type=Path, help="config.json of the UNet (default: that of the bundled digits model)")
    add("--loss", default=usual.loss, help=f"one of {', '.join(LOSSES)}")
    add("--path", default=usual.path, help=f"forward process: one of {', '.join(PATHS)}")
    add("--iterations", type=int, default=usual.iterations)
    add(
        "--distil-from",
        type=int,
        default=usual.distil_from,
        help="lsd: iterations of plain flow matching first",
    )
    add("--jump-weight", type=float, default=usual.jump_weight, help="lsd: weight of the flow-map loss")
    add("--init", type=Path, help="model folder to start from, instead of fresh weights")
    add("--batch-size", type=int, default=usual.batch_size)
    add("--learning-rate", type=float, default=usual.learning_rate)
    add("--ema", type=float, default=usual.ema, help="decay of the averaged weights")
    add("--holdout", type=int, default=usual.holdout, help="last images of the set, never trained on")
    add("--seed", type=int, default=usual.seed)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--compile", action="store_true", help="use torch.compile")


def train(options: argparse.Namespace) -> int:
    """``fastdiff train``."""
    names = ("loss", "path", "iterations", "distil_from", "jump_weight", "batch_size", "learning_rate", "ema",
             "holdout", "seed", "compile")  # fmt: skip
    config = TrainConfig(**{name: getattr(options, name) for name in names})
    config.check()
    sizes = UNetConfig.from_dict(read_json(options.config or resolve("digits") / "config.json"))
    data = load_images(options.data, sizes.sample_size)
    classes = int(data.labels.max()) + 1
    if sizes.num_class_embeds is not None and sizes.num_class_embeds != classes + 1:
        raise PlanError(f"num_class_embeds is {sizes.num_class_embeds}; this data set has {classes} classes and needs "
                        f"{classes + 1}, the last meaning 'no class'")  # fmt: skip
    conditional = sizes.num_class_embeds is not None
    info = ModelInfo(
        classes=tuple(str(i) for i in range(classes)) if conditional else (),
        null_label=classes if conditional else None,
        crop=(sizes.sample_size - data.original_size) // 2,
    )
    initial = load_model(options.init) if options.init else None
    trainer = Trainer(config, sizes, data, options.out, info, torch.device(options.device), initial)
    resumed = trainer.resume()
    quiet = options.json or not sys.stderr.isatty()
    with tqdm(total=config.iterations, initial=trainer.iteration, unit="it", disable=quiet) as bar:
        for record in trainer.run():
            bar.update(int(record["iteration"]) - bar.n)
            bar.set_postfix({k: v for k, v in record.items() if k not in ("iteration", "seconds")})
            if quiet and not options.json:
                print(record, file=sys.stderr)
    report = {"model": str(options.out), "iteration": trainer.iteration, "resumed": resumed}
    show(options, report, f"{options.out}: trained to iteration {trainer.iteration}")
    return 0


def _caching(options: argparse.Namespace) -> list[dict[str, float]]:
    """What step caching does to a few images of the model."""
    from fastdiff.backends.lossy import caching_report

    pipe = Pipeline.from_pretrained(options.target)
    labels = [label for label in pipe.examples() if label is not None] or None

    def draw(interval: int, branch: int) -> torch.Tensor:
        images: torch.Tensor = pipe(
            labels, seed=0, num_inference_steps=options.steps, sampler=pipe.sampler or "dpmpp_2m", output_type="pt",
            cache_interval=interval, cache_branch_id=branch,
        ).images  # fmt: skip
        return images

    return caching_report(draw, [(i, b) for i in options.cache_interval for b in options.cache_branch_id])


def inspect(options: argparse.Namespace) -> int:
    """``fastdiff inspect``."""
    if str(options.target).endswith(".onnx"):
        from dataclasses import asdict

        from fastdiff.artifact import load_manifest

        report, plan = asdict(load_manifest(Path(options.target))), {}
    else:
        from fastdiff.backends.in_memory import explain

        folder = resolve(options.target)
        loaded = load_model(folder)
        info, config = loaded.info, loaded.network.config
        report = {
            "folder": str(folder),
            "sha256": fingerprint(folder),
            "parameters": sum(p.numel() for p in loaded.network.parameters()),
            "input": [config.in_channels, config.sample_size, config.sample_size],
            "block_out_channels": list(config.block_out_channels),
            "path": info.path,
            "prediction": info.prediction,
            "flow_map": info.target is not None,
            "classes": list(info.classes),
            "guidance_scale": info.guidance_scale,
            "backends": list(BACKENDS),
        }
        plan = explain(loaded.network)
        if options.dtype != "float32":
            from fastdiff.backends.lossy import lossy_report

            report[options.dtype] = lossy_report(loaded.network, DTYPES[options.dtype])
        if options.cache_interval:
            report["step_caching"] = _caching(options)
    width = max(len(name) for name in report)
    lines = [f"{name:<{width}}  {value}" for name, value in report.items() if name != "step_caching"]
    lines += [f"step caching: {entry}" for entry in report.get("step_caching", ())]
    for size, choices in plan.items():
        lines += ["", f"on this CPU, {size}:", *(f"  {layer:<60} {choice}" for layer, choice in choices.items())]
    show(options, report | ({"cpu": plan} if plan else {}), "\n".join(lines))
    return 0
