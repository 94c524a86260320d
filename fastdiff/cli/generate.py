"""``fastdiff generate``: pictures from labels or prompts."""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastdiff.built import BuiltTextToImage, is_built, load_built
from fastdiff.calibration.file import AUTO
from fastdiff.cli.common import DTYPES, add_running_options, show
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.images import save_png
from fastdiff.pipeline import Pipeline
from fastdiff.sampling import GRIDS, GUIDANCES, SOLVERS
from fastdiff.text_to_image import TextToImage

TEXT_ONLY = ("prompt", "negative_prompt", "height", "width", "image", "mask_image", "strength", "lora", "cpu_offload",
             "vae_tiling")  # fmt: skip
BUILT_TEXT = TEXT_ONLY[:4]  # what built folders take too
MODEL_ONLY = ("steps", "sampler", "guidance_scale", "guidance_rescale", "guidance_interval", "clip", "grid", "eta",
              "gamma", "artifact", "tolerance", "calibration")  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
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
        type=steps,
        dest="steps",
        metavar="N",
        help="steps (default: 4 or 20); auto: the fewest of a calibrated sampler that keep to --tolerance",
    )
    add("--tolerance", type=float, metavar="ERROR", help="relative error to allow --steps auto")
    add(
        "--sampler",
        help=f"one of {', '.join(SOLVERS)}, or calibrated; options follow a colon: unipc:order=3,corrector=false",
    )
    add("--calibration", type=Path, metavar="FILE",
        help="what calibrated means (default: calibration.json in the model's folder)")  # fmt: skip
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
    add(
        "--cache-interval",
        type=int,
        default=1,
        metavar="N",
        help="step caching, lossy: run the whole network at every N-th evaluation only (default: 1)",
    )
    add(
        "--cache-branch-id",
        type=int,
        default=0,
        metavar="I",
        help="skip connection above which the network runs at the others (default: 0, the shallowest)",
    )
    add("--seed", type=int, default=0, help="image i gets seed + i (default: 0)")
    add("--latents", type=Path, help=".npy file with the starting noise, [B, C, H, W]")
    add("--cpu-offload", action="store_true", help="keep networks in the host's memory, on the GPU only while they run")
    add("--vae-tiling", action="store_true", help="decode in tiles, with less memory")
    add_running_options(command)
    add("--preset", help="what to draw with, for folders that fastdiff build made (default: the folder's first)")
    add("--trust", metavar="SHA256", help="hash that fastdiff build printed: take engines made on another machine")
    add("--out", type=Path, default=Path("out"), help="folder for the PNG files (default: out)")


def steps(text: str) -> int | str:
    """Read a number of steps, or ``auto``."""
    return text if text == AUTO else int(text)


def generate(options: argparse.Namespace) -> int:
    """``fastdiff generate``."""
    if is_built(Path(options.model)):
        return _from_built(options)
    for name in ("preset", "trust"):
        if getattr(options, name):
            raise PlanError(f"--{name} is for folders that fastdiff build made; {options.model} is not one")
    if options.cpu_offload and options.device == "cpu":
        raise PlanError("--cpu-offload saves a GPU's memory; give --device cuda with it")
    pipe = Pipeline.from_pretrained(
        options.model, device="cpu" if options.cpu_offload else options.device, dtype=DTYPES[options.dtype],
        backend=options.backend, artifact=options.artifact,
    )  # fmt: skip
    if options.calibration is not None:
        pipe.load_calibration(options.calibration)
    latents = read_latents(options.latents) if options.latents else None
    start = time.perf_counter()
    if isinstance(pipe, TextToImage):
        images = _text_to_image(pipe, options, latents)
        seconds = time.perf_counter() - start
        sampler = options.sampler or pipe.parts.sampler.options.name
        facts = {"sampler": sampler, "steps": _told(pipe, options), "software": "fastdiff"}
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
            tolerance=options.tolerance, sampler=options.sampler, guidance_scale=options.guidance_scale,
            guidance=options.guidance, guidance_rescale=options.guidance_rescale,
            guidance_interval=options.guidance_interval, clip=options.clip, grid=options.grid,
            eta=options.eta, gamma=options.gamma, seed=options.seed, latents=latents,
            cache_interval=options.cache_interval, cache_branch_id=options.cache_branch_id,
            callback_on_step_end=lambda *_: bar.update(),
        ).images  # fmt: skip
    seconds = time.perf_counter() - start
    sampler = options.sampler or str(pipe.choose(None, None)[0])
    facts = {"sampler": sampler, "steps": _told(pipe, options), "model": pipe.model_hash(), "software": "fastdiff"}
    return _written(options, images, facts, seconds)


def _told(pipe: Pipeline | TextToImage, options: argparse.Namespace) -> str:
    """The number of steps as pictures tell it."""
    steps = pipe.choose(options.sampler, options.steps, options.tolerance)[1]
    return f"auto, tolerance {options.tolerance:g}" if steps == AUTO else str(steps)


def _from_built(options: argparse.Namespace) -> int:
    if (options.cache_interval, options.cache_branch_id) != (1, 0):
        raise PlanError(f"--cache-interval and --cache-branch-id are for models; {options.model} was built")
    backend = "onnxruntime" if options.backend == "auto" else options.backend
    pipe = load_built(options.model, device=options.device, backend=backend, trust=options.trust)
    text = isinstance(pipe, BuiltTextToImage)
    for name in (*TEXT_ONLY, *MODEL_ONLY):
        if getattr(options, name) and not (text and name in BUILT_TEXT):
            raise PlanError(f"--{name.replace('_', '-')} is for models; {options.model} was built: choose a --preset")
    latents = read_latents(options.latents) if options.latents else None
    given = {"preset": options.preset, "num_images_per_prompt": options.num_images_per_prompt, "seed": options.seed,
             "latents": latents}  # fmt: skip
    start = time.perf_counter()
    if isinstance(pipe, BuiltTextToImage):
        _check_prompt(options)
        images = pipe(options.prompt, negative_prompt=options.negative_prompt, height=options.height,
                      width=options.width, **given).images  # fmt: skip
    else:
        images = pipe(options.class_labels or list(range(len(pipe.folder.classes))) or None, **given).images
    seconds = time.perf_counter() - start
    made = pipe.folder.presets[pipe.folder.preset(options.preset)]
    facts = {"sampler": made.sampler, "steps": str(made.num_inference_steps), "model": pipe.folder.model_sha256,
             "software": "fastdiff"}  # fmt: skip
    return _written(options, images, facts, seconds)


def _text_to_image(pipe: TextToImage, options: argparse.Namespace, latents: torch.Tensor | None) -> list[Image.Image]:
    _check_prompt(options)
    if options.cpu_offload:
        pipe.enable_model_cpu_offload(options.device)
    if options.vae_tiling:
        pipe.enable_vae_tiling()
    for i, file in enumerate(options.lora):
        pipe.load_lora_weights(file, f"{i}")
    pictures = {
        name: read_picture(getattr(options, name)) for name in ("image", "mask_image") if getattr(options, name)
    }
    with tqdm(desc="sampling", unit="step", disable=options.json or not sys.stderr.isatty()) as bar:
        images: list[Image.Image] = pipe(
            options.prompt, negative_prompt=options.negative_prompt, height=options.height, width=options.width,
            strength=options.strength, num_inference_steps=options.steps,
            tolerance=options.tolerance, sampler=options.sampler,
            guidance_scale=options.guidance_scale, guidance_rescale=options.guidance_rescale, eta=options.eta,
            num_images_per_prompt=options.num_images_per_prompt, seed=options.seed, latents=latents, **pictures,
            cache_interval=options.cache_interval, cache_branch_id=options.cache_branch_id,
            callback_on_step_end=lambda *_: bar.update(),
        ).images  # fmt: skip
    return images


def _check_prompt(options: argparse.Namespace) -> None:
    if options.class_labels is not None:
        raise PlanError(f"--class-labels is for class-conditional models; {options.model} takes --prompt")
    if not options.prompt:
        raise PlanError("--prompt is missing: what is the picture to show?")


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
    show(options, report, f"{count} images in {seconds:.2f} s, written to {options.out}")
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
