"""The command line: ``fastdiff generate | export | bench | train | inspect``.

Exit codes: 0 done, 1 failed, 2 wrong usage. Every deliberate error is one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from fastdiff.backends import BACKENDS
from fastdiff.errors import ArtifactError, BackendError, FastdiffError, PlanError
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import read_json
from fastdiff.models.weights import ModelInfo, fingerprint, load_model
from fastdiff.pipeline import Pipeline, resolve
from fastdiff.sampling import GRIDS, GUIDANCES, PATHS, SOLVERS
from fastdiff.text_to_image import TextToImage
from fastdiff.training import LOSSES, TrainConfig, Trainer, load_images

TEXT_STEPS = 50  # diffusers' default
TEXT_ONLY = ("prompt", "negative_prompt", "height", "width", "image", "mask_image", "strength", "lora")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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

    _generate_options(add("generate", generate, "Generate images and write them as PNG files.", model))
    _export_options(add("export", export, "Export the network, or a whole sampler, to ONNX.", model))
    _bench_options(add("bench", bench, "Measure latency and quality beside the peers, in one run.", model))
    _train_options(add("train", train, "Train a UNet; resumes from its folder's checkpoint.", shared))
    command = add("inspect", inspect, "Show what a model folder or an exported file is.", shared)
    command.add_argument("target", nargs="?", default="digits", help="model folder, bundled name, or .onnx file")
    return parser


def _generate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--class-labels",
        type=int,
        nargs="+",
        metavar="LABEL",
        help="what to draw (default: every class once)",
    )
    add("--prompt", nargs="+", metavar="TEXT", help="what to show, for text-to-image models")
    add("--negative-prompt", metavar="TEXT", help="what not to show")
    add("--height", type=int, help="of the picture (default: the model's own)")
    add("--width", type=int)
    add("--image", type=Path, help="picture to start from, or to paint into")
    add("--mask-image", type=Path, help="where to paint: white")
    add("--strength", type=float, help="how much of the picture is made anew, 0 to 1")
    add("--lora", type=Path, nargs="+", default=[], metavar="FILE", help="LoRA files to merge")
    add("--num-images-per-prompt", type=int, default=1, metavar="N", help="images for each label (default: 1)")
    add(
        "--num-inference-steps",
        "--steps",
        type=int,
        dest="steps",
        metavar="N",
        help="steps (default: 4 or 20)",
    )
    add("--sampler", help=f"one of {', '.join(SOLVERS)}; options follow a colon: unipc:order=3,corrector=false")
    add("--guidance-scale", type=float, help="strength of guidance; 1 means none (default: the model's own)")
    add("--guidance", default="cfg", help=f"how to guide: one of {', '.join(GUIDANCES)} (default: cfg)")
    add("--guidance-rescale", type=float, default=0.0, help="keep the contrast of the unguided output, 0 to 1")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide between these noise levels sigma / alpha only (default: everywhere)",
    )
    add("--clip", type=float, help="bound of the denoised estimate (default: none)")
    add("--grid", help=f"where to put the steps: one of {', '.join(GRIDS)}")
    add("--eta", type=float, help="share of fresh noise of ddim and dpmpp_sde, 0 to 1")
    add("--gamma", type=float, help="share of fresh noise of flow_map, 0 to 1")
    add("--seed", type=int, default=0, help="image i gets seed + i (default: 0)")
    add("--latents", type=Path, help=".npy file with the starting noise, [B, C, H, W]")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=sorted(DTYPES))
    add("--backend", default="eager", choices=sorted(BACKENDS))
    add("--artifact", type=Path, help="exported file, for backends that run one")
    add("--out", type=Path, default=Path("out"), help="folder for the PNG files (default: out)")


def generate(options: argparse.Namespace) -> int:
    """``fastdiff generate``."""
    pipe = Pipeline.from_pretrained(
        options.model, device=options.device, dtype=DTYPES[options.dtype], backend=options.backend,
        artifact=options.artifact,
    )  # fmt: skip
    latents = read_latents(options.latents) if options.latents else None
    start = time.perf_counter()
    if isinstance(pipe, TextToImage):
        images = _text_to_image(pipe, options, latents)
        seconds = time.perf_counter() - start
        sampler = options.sampler or pipe.parts.sampler.options.name
        facts = {"sampler": sampler, "steps": str(options.steps or TEXT_STEPS), "software": "fastdiff"}
        return _written(options, images, facts, seconds)
    wrong = next((name for name in TEXT_ONLY if getattr(options, name)), None)
    if wrong:
        raise PlanError(f"--{wrong.replace('_', '-')} is for text-to-image models; {options.model} is not one")
    labels = options.class_labels
    if labels is None:
        labels = list(range(len(pipe.model.info.classes))) or None
    pipe.labels(labels, options.num_images_per_prompt)
    with tqdm(desc="sampling", unit="step", disable=options.json or not sys.stderr.isatty()) as bar:
        images = pipe(
            labels, num_images_per_prompt=options.num_images_per_prompt, num_inference_steps=options.steps,
            sampler=options.sampler, guidance_scale=options.guidance_scale, guidance=options.guidance,
            guidance_rescale=options.guidance_rescale, guidance_interval=options.guidance_interval, clip=options.clip,
            grid=options.grid, eta=options.eta, gamma=options.gamma, seed=options.seed, latents=latents,
            callback_on_step_end=lambda *_: bar.update(),
        ).images  # fmt: skip
    seconds = time.perf_counter() - start
    sampler, steps = pipe.choose(options.sampler, options.steps)
    facts = {"sampler": str(sampler), "steps": str(steps), "model": pipe.model_hash(), "software": "fastdiff"}
    return _written(options, images, facts, seconds)


def _text_to_image(pipe: TextToImage, options: argparse.Namespace, latents: torch.Tensor | None) -> list[Image.Image]:
    if options.class_labels is not None:
        raise PlanError(f"--class-labels is for class-conditional models; {options.model} takes --prompt")
    if not options.prompt:
        raise PlanError("--prompt is missing: what is the picture to show?")
    for i, file in enumerate(options.lora):
        pipe.load_lora_weights(file, f"{i}")
    pictures = {
        name: read_picture(getattr(options, name)) for name in ("image", "mask_image") if getattr(options, name)
    }
    with tqdm(desc="sampling", unit="step", disable=options.json or not sys.stderr.isatty()) as bar:
        images: list[Image.Image] = pipe(
            options.prompt, negative_prompt=options.negative_prompt, height=options.height, width=options.width,
            strength=options.strength, num_inference_steps=options.steps or TEXT_STEPS, sampler=options.sampler,
            guidance_scale=options.guidance_scale, guidance_rescale=options.guidance_rescale, eta=options.eta,
            num_images_per_prompt=options.num_images_per_prompt, seed=options.seed, latents=latents, **pictures,
            callback_on_step_end=lambda *_: bar.update(),
        ).images  # fmt: skip
    return images


def read_picture(file: Path) -> Image.Image:
    """Read a picture.

    Raises:
        ArtifactError: if it is missing or no picture that Pillow knows.
    """
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{file}: not a picture ({error})") from error


def _written(options: argparse.Namespace, images: list[Image.Image], facts: dict[str, str], seconds: float) -> int:
    """Write the pictures and say so."""
    count = len(images)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [
        str(save_png(image, options.out / f"{options.seed + i:06d}.png", {**facts, "seed": str(options.seed + i)}))
        for i, image in enumerate(images)
    ]
    report = {"files": files, "seconds": round(seconds, 4), "ms_per_image": round(1000 * seconds / count, 2)}
    _show(options, report, f"{count} images in {seconds:.2f} s, written to {options.out}")
    return 0


def read_latents(file: Path) -> torch.Tensor:
    """Read starting noise from a ``.npy`` file; nothing in it is unpickled."""
    try:
        with file.open("rb") as stream:  # numpy leaves a file that it opened and could not read open
            array = np.load(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{file}: need a .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        found = f"it holds {array.dtype}" if isinstance(array, np.ndarray) else "it is an archive"
        raise ArtifactError(f"{file}: need a .npy file of real numbers; {found}")
    return torch.from_numpy(array.astype(np.float32))


def save_png(image: Image.Image, file: Path, facts: dict[str, str]) -> Path:
    """Write a PNG that says how it was made; it appears whole or not at all."""
    text = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        text.add_text(name, value)
    temporary = file.with_name(f".{file.name}.part")
    try:
        image.save(temporary, format="PNG", pnginfo=text)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _export_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", type=Path, default=Path("unet.onnx"), help="file to write (default: unet.onnx)")
    add(
        "--fuse-sampler",
        type=int,
        metavar="N",
        help="put a whole N-step sampler into the file: noise in, images out",
    )
    add("--sampler", help="the sampler to fuse (default: flow_map for flow maps, else dpmpp_2m)")
    add("--guidance-scale", type=float, help="strength to fuse (default: the model's own)")


def export(options: argparse.Namespace) -> int:
    """``fastdiff export``."""
    try:
        from fastdiff.export.onnx import export_sampler, export_unet
    except ImportError as error:
        raise BackendError(f"export needs {error.name}: pip install 'fastdiff[onnx]'") from error
    loaded = load_model(resolve(options.model))
    if options.fuse_sampler is None:
        if options.sampler or options.guidance_scale is not None:
            raise PlanError("--sampler and --guidance-scale belong to --fuse-sampler N")
        manifest = export_unet(loaded, options.out)
    else:
        manifest = export_sampler(loaded, options.out, options.fuse_sampler, options.sampler, options.guidance_scale)
    report = {"file": str(options.out), "kind": manifest.kind, "inputs": manifest.inputs,
              "outputs": manifest.outputs, "parity": manifest.parity}  # fmt: skip
    lines = [f"{options.out}: {manifest.kind}, opset {manifest.opset}, checked against torch in float64:"]
    lines += [f"  batch {b}: relative error {e['exported']:.1e} (torch float32: {e['torch']:.1e})"
              for b, e in manifest.parity.items()]  # fmt: skip
    _show(options, report, "\n".join(lines))
    return 0


def _bench_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--samples", type=int, default=5000, help="images for each quality figure (default: 5000)")
    add("--rounds", type=int, default=15, help="interleaved rounds of the timing (default: 15)")
    add("--backends", nargs="+", default=sorted(BACKENDS), choices=sorted(BACKENDS))
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
    _show(
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
    _show(options, report, f"{options.out}: trained to iteration {trainer.iteration}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """``fastdiff inspect``."""
    if str(options.target).endswith(".onnx"):
        from dataclasses import asdict

        from fastdiff.artifact import load_manifest

        report = asdict(load_manifest(Path(options.target)))
    else:
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
    width = max(len(name) for name in report)
    _show(options, report, "\n".join(f"{name:<{width}}  {value}" for name, value in report.items()))
    return 0


def _show(options: argparse.Namespace, report: dict[str, Any], text: str) -> None:
    print(json.dumps(report) if options.json else text)


if __name__ == "__main__":
    sys.exit(main())
