"""``fastdiff serve``: a model behind HTTP."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.common import DTYPES, add_ray_options, add_running_options, scale_of, show, source_of
from fastdiff.errors import BackendError, PlanError
from fastdiff.pipeline import Pipeline, resolve

if TYPE_CHECKING:  # the extra may be missing
    from fastdiff.serve import Served

EXAMPLE = """\
Try it:
  fastdiff serve --model digits            (with replicas on this machine's cores or GPUs: --ray)
  open http://127.0.0.1:8000 in a browser, or
  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \\
       -d '{"class_label": 3, "seed": 1}'

Whatever is not given here is read from the environment, as FASTDIFF_SERVE_PORT, FASTDIFF_SERVE_MAX_STEPS and so on.
SIGTERM or Ctrl-C: requests in flight are finished first. docs/SERVING.md says more."""
# setting: metavar, help
NUMBERS = {
    "port": ("PORT", "where to listen; 0: any free port (default: 8000)"),
    "max_batch": ("N", "places in one evaluation of the network; a guided image takes two (default: 8)"),
    "max_queue": ("N", "images that may wait; beyond, clients are told when to come again (default: 256)"),
    "max_images": ("N", "images of one request (default: 16)"),
    "max_steps": ("N", "steps of one image (default: 200)"),
    "max_pixels": ("N", "pixels of one image (default: 4194304)"),
    "max_body": ("BYTES", "size of a request (default: 131072)"),
    "timeout": ("SECONDS", "from request to image (default: 300)"),
    "drain": ("SECONDS", "for requests in flight when the server is told to stop (default: 30)"),
}


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = command.add_argument
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    add("--name", help="what clients call the model (default: the name of its folder)")
    add("--host", metavar="ADDRESS", help="where to listen (default: 127.0.0.1: this machine only)")
    add("--api-key-env", metavar="VARIABLE", help="environment variable with the key that clients have to give")
    for name, (metavar, text) in NUMBERS.items():
        add("--" + name.replace("_", "-"), type=float if metavar == "SECONDS" else int, metavar=metavar, help=text)
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="JSON lines on stderr")
    add("--size", type=_size, nargs="+", metavar="WIDTHxHEIGHT",
        help="what text-to-image models may be asked for, the default first (default: the model's own)")  # fmt: skip
    add("--preview-decoder", type=Path, metavar="FOLDER",
        help="tiny autoencoder for previews of text-to-image models (default: the model's own)")  # fmt: skip
    add_running_options(command)
    add("--ray", nargs="?", const="local", metavar="ADDRESS",
        help="serve from replicas on Ray: a cluster of its own on this machine, or the one at ADDRESS")  # fmt: skip
    add_ray_options(command, "replicas")


def serve(options: argparse.Namespace) -> int:
    """``fastdiff serve``."""
    try:
        from pydantic import ValidationError

        from fastdiff.serve.run import run
        from fastdiff.serve.settings import Settings
    except ImportError as error:
        raise BackendError(f"serve needs {error.name}: pip install 'fastdiff[serve]'") from error
    if options.ray is None and (options.workers or options.cores):
        raise PlanError("--replicas and --cpus-per-replica belong to --ray")
    try:
        settings = Settings(**_given(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise PlanError(f"--{name} is {first['input']!r}; {first['msg'].lower()}") from error
    name = options.name or resolve(options.model).resolve().name

    def ready(url: str) -> None:
        show(options, {"url": url, "model": name}, f"{name} is served at {url} (Ctrl-C ends it)")

    try:
        if options.ray is not None:
            from fastdiff.serve.ray.run import run as run_on_ray

            run_on_ray(
                source_of(options), name, settings, scale_of(options), options.log_level, ready, address=options.ray
            )
        else:
            run(_served(options, name), settings, options.log_level, ready)
    except KeyboardInterrupt:  # raised once more when all requests were finished
        pass
    return 0


def _served(options: argparse.Namespace, name: str) -> Served:
    """What the server is told of a model."""
    from fastdiff.serve import served_of

    pipe = Pipeline.from_pretrained(
        options.model, device=options.device, dtype=DTYPES[options.dtype], backend=options.backend,
        artifact=options.artifact,
    )  # fmt: skip
    return served_of(pipe, name, options.size or (), options.preview_decoder)


def _size(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT`` as height and width."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} given; allowed: WIDTHxHEIGHT, such as 512x512")
    return int(height), int(width)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names."""
    names = ("host", *NUMBERS)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.api_key_env is not None:
        key = os.environ.get(options.api_key_env)
        if not key:
            raise PlanError(f"--api-key-env is {options.api_key_env}; that variable is not set, or empty")
        given["api_key"] = key
    return given
