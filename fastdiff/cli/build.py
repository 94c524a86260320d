"""``fastdiff build``: what production runs: a folder of graphs, engines and tables, or a repository for Triton."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.cli.common import DTYPES, show
from fastdiff.cli.export import source
from fastdiff.errors import BackendError, PlanError
from fastdiff.integrations.schedulers import from_diffusers_scheduler
from fastdiff.models.autoencoder_files import load_autoencoder
from fastdiff.models.weights import MANIFEST, load_model
from fastdiff.pipeline import resolve
from fastdiff.text_to_image.loading import INDEX, load_text_encoders, part_of, read_index
from fastdiff.text_to_image.parts import usual_strength

FORMATS = ("folder", "triton-server")


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = command.add_argument
    add("--out", type=Path, default=Path("built"), help="folder to make (default: built); it must not exist")
    add(
        "--format",
        default="folder",
        choices=FORMATS,
        help="folder: for fastdiff itself; triton-server: a model repository of NVIDIA Triton Inference Server",
    )
    add("--steps", type=int, nargs="+", metavar="N", help="numbers of steps (default: 4 or 20)")
    add("--fuse", action="store_true", help="whole samplers as graphs: noise in, images out (always for triton-server)")
    add("--sampler", help="the sampler (default: flow_map for flow maps, else dpmpp_2m)")
    add("--guidance-scale", type=float, help="strength of guidance (default: the model's own)")
    add(
        "--engine",
        nargs="*",
        metavar="ARCH",
        help="also build engines: TensorRT for RTX for the GPUs named, as sm86 sm89 sm120, with no GPU needed; "
        "TensorRT, without a name, for the GPU that is here",
    )
    add("--library", choices=["tensorrt", "tensorrt_rtx"], help="who builds engines (default: the one installed)")
    add(
        "--batch", type=int, nargs=3, default=(1, 1, 8), metavar=("MIN", "USUAL", "MAX"),
        help="numbers of images that engines are built for; MAX is also the server's largest batch (default: 1 1 8)",
    )  # fmt: skip
    add("--dtype", default="float32", choices=sorted(DTYPES), help="in which graphs and engines compute")
    add("--graph", type=Path, metavar="FILE", help="build engines of this export, of any model, and nothing else")
    add(
        "--bucket", action="append", nargs="+", metavar="DIM=MIN:USUAL:MAX",
        help="sizes that engines are built for; may be repeated. With --graph: of all that the export leaves free, as "
        "batch=1:2:4 height=64:64:128; of a text-to-image model: height and width in latents (default: its own)",
    )  # fmt: skip
    add("--refit", action="store_true", help="engines whose weights can be changed")
    add("--cache", type=Path, help="folder of engines built before (default: in the user's cache folder)")
    add("--name", help="name of the model in the repository (default: that of the model folder)")
    add("--queue-delay-us", type=int, default=2000, help="most that the server waits to fill a batch (default: 2000)")


def build(options: argparse.Namespace) -> int:
    """``fastdiff build``."""
    try:
        from fastdiff.export.build import Wanted, build_folder
    except ImportError as error:
        raise BackendError(f"build needs {error.name}: pip install 'fastdiff[onnx]'") from error
    if options.graph is not None:
        return _graph(options)
    fused = options.fuse or options.format == "triton-server"
    counts = options.steps or [None]
    wanted = [Wanted(steps, options.sampler, options.guidance_scale, fused) for steps in counts]
    root = resolve(options.model)
    if (root / INDEX).exists() and not (root / MANIFEST).exists():
        return _text_to_image(options, wanted)
    if options.bucket:
        raise PlanError("--bucket belongs to --graph and to text-to-image models; others have one size")
    engines = None if options.engine is None else _engines(options)
    if options.format == "triton-server":
        return _repository(options, wanted, engines)
    digest = build_folder(load_model(resolve(options.model)), options.out, wanted, engines, DTYPES[options.dtype])
    return _built(options, digest, "", _to_trust(engines, digest))


def _to_trust(engines: Any, digest: str) -> list[str]:
    return [] if engines is None else [f"on another machine its engines need: --trust {digest}"]


def _built(options: argparse.Namespace, digest: str, how: str, more: Sequence[str] = ()) -> int:
    """Say what was built, and how it is run."""
    report = {"folder": str(options.out), "sha256": digest, "bytes": _size(options.out)}
    line = (
        f"{options.out}: {_size(options.out) / 1e6:.1f} MB; run it with: fastdiff generate --model {options.out}{how}"
    )
    show(options, report, "\n".join([line, *more]))
    return 0


def _text_to_image(options: argparse.Namespace, wanted: Any) -> int:
    """Build a folder of all networks of a pipeline."""
    from fastdiff.export.build_text import build_text_folder

    if options.format != "folder":
        raise PlanError("--format is not for text-to-image models; their graphs alone: fastdiff build --graph")
    engines = None if options.engine is None else _engines(options)
    if engines is None and options.bucket:
        raise PlanError("--bucket gives the sizes of engines; it needs --engine")
    sizes = [dict(map(read_bounds, given)) for given in options.bucket or ()]
    model = text_model(resolve(options.model))
    digest = build_text_folder(model, options.out, wanted, DTYPES[options.dtype], engines, sizes)
    return _built(options, digest, " --prompt ...", _to_trust(engines, digest))


def text_model(root: Path) -> Any:
    """Load all networks of a text-to-image folder, float32.

    Raises:
        ArtifactError: if anything is missing, damaged or foreign.
        PlanError: if the folder has a ControlNet.
    """
    from fastdiff.export.build_text import TextModel

    index = read_index(root)
    if (root / "controlnet").is_dir():
        raise PlanError(f"{root} has a ControlNet; a folder is built of networks that read text alone")
    unet, trained = source(root)
    sampler = from_diffusers_scheduler(part_of(root, index, "scheduler"))
    return TextModel(
        unet,
        load_autoencoder(part_of(root, index, "vae")),
        load_text_encoders(root, index, DTYPES["float32"]),
        sampler,
        sampler.options.name,
        trained,
        usual_strength(unet.network.config.addition_embed_type is not None),
        bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def _engines(options: argparse.Namespace) -> Any:
    from fastdiff.backends.trt_library import find_library
    from fastdiff.export.build import Engines
    from fastdiff.export.plan_cache import PlanCache
    from fastdiff.kernels.native import Unavailable, cache_folder

    try:
        place = options.cache or cache_folder() / "plans"
    except Unavailable as error:
        raise BackendError(f"{error}, or give --cache") from error
    library = find_library(options.library or ("tensorrt_rtx" if options.engine else None))
    quiet = options.json or not sys.stderr.isatty()
    batch = (options.batch[0], options.batch[1], options.batch[2])
    return Engines(PlanCache(place, library), tuple(options.engine), batch, options.refit, bars=not quiet)


def _graph(options: argparse.Namespace) -> int:
    from fastdiff.export.build import appearing, build_graph

    if options.engine is None or not options.bucket:
        raise PlanError("--graph needs --engine, and one --bucket or more")
    buckets = [dict(map(read_bounds, given)) for given in options.bucket]
    with appearing(options.out) as folder:
        plans = [plan.relative_to(folder) for plan in build_graph(options.graph, folder, buckets, _engines(options))]
    report = {"folder": str(options.out), "plans": [plan.as_posix() for plan in plans]}
    show(options, report, "\n".join(f"{options.out / plan}" for plan in plans))
    return 0


def read_bounds(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``batch=1:2:4``.

    Raises:
        PlanError: if it is not of that form.
    """
    name, _, sizes = text.partition("=")
    try:
        low, usual, high = map(int, sizes.split(":"))
    except ValueError as error:
        raise PlanError(f"--bucket {text}: allowed is DIM=MIN:USUAL:MAX, as batch=1:2:4") from error
    return name, (low, usual, high)


def _repository(options: argparse.Namespace, wanted: Any, engines: Any) -> int:
    from fastdiff.built import read_folder
    from fastdiff.export.build import appearing, build_folder
    from fastdiff.export.triton_server import Serving, write_model

    if engines is not None and engines.cache.library.rtx:
        raise PlanError("the server runs engines of TensorRT alone; leave --engine out, or give --library tensorrt")
    serving = Serving(max_batch_size=options.batch[2], max_queue_delay_us=options.queue_delay_us)
    folder = resolve(options.model)
    stem = options.name or folder.resolve().name
    made: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch, appearing(options.out) as repository:
        place = Path(scratch) / "built"
        build_folder(load_model(folder), place, wanted, engines, DTYPES[options.dtype])
        for key, preset in read_folder(place).presets.items():
            name = f"{stem}_{key.removesuffix('-fused')}"
            made.append(write_model(repository, name, place / preset.graph, serving))
            made += [
                write_model(repository, f"{name}_{here}", place / plan, serving) for here, plan in preset.plans.items()
            ]
    report: dict[str, Any] = {"repository": str(options.out), "models": [path.name for path in made]}
    show(options, report, f"{options.out}: {', '.join(report['models'])}\nserve it with: tritonserver "
                          f"--model-repository {options.out.resolve()}")  # fmt: skip
    return 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
