"""``fastdiff export``: networks and whole samplers as ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdiff.cli.common import DTYPES, show
from fastdiff.errors import BackendError, PlanError
from fastdiff.integrations.schedulers import from_diffusers_scheduler
from fastdiff.models.autoencoder_files import load_autoencoder
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import inside, read_json
from fastdiff.models.lora import LoraSet, read_lora
from fastdiff.models.weights import MANIFEST, Model, ModelInfo, load_model, load_unet
from fastdiff.pipeline import INDEX, resolve
from fastdiff.text_to_image.loading import load_controlnet, load_text_encoders, read_index
from fastdiff.text_to_image.parts import usual_strength

PARTS = ("unet", "decoder", "controlnet", "text-encoder", "text-encoder-2")
TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx", "onnx")


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = command.add_argument
    add("--out", type=Path, default=Path("unet.onnx"), help="file to write (default: unet.onnx)")
    add("--part", default="unet", choices=PARTS,
        help="what of the model to export; a ControlNet's folder is given with --model (default: unet)")  # fmt: skip
    add("--dtype", default="float32", choices=sorted(DTYPES), help="in which the graph computes (default: float32)")
    add("--target", default="onnxruntime", choices=TARGETS, help="who is to run it (default: onnxruntime)")
    add("--opset", type=int, help="version of ONNX's operators (default: what suits the target)")
    add("--external-data", action=argparse.BooleanOptionalAction,
        help="weights in a file of their own (default: from 1.5 GB on)")  # fmt: skip
    add("--split", action=argparse.BooleanOptionalAction,
        help="two graphs, one for what is computed once for a run (default: for networks that read text)")  # fmt: skip
    add("--control", action="store_true", help="take the residuals of ControlNets as inputs")
    add("--adapters", action="store_true", help="take the factors of LoRA adapters as inputs")
    add("--lora", type=Path, nargs="+", default=[], metavar="FILE", help="LoRA files to merge first")
    add("--fuse-sampler", type=int, metavar="N", help="put a whole N-step sampler into the file: noise in, images out")
    add("--sampler", help="the sampler to fuse (default: flow_map for flow maps, else dpmpp_2m)")
    add("--guidance-scale", type=float, help="strength to fuse (default: the model's own)")
    add(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of what the graph is for, in latents (default: any; for a fused sampler the model's own)",
    )
    add("--per-layer", action="store_true", help="report the error of every layer too")
    add("--parity", action=argparse.BooleanOptionalAction, default=True, help="measure the error (default: yes)")


def export(options: argparse.Namespace) -> int:
    """``fastdiff export``."""
    try:
        from fastdiff.export.publish import Options
    except ImportError as error:
        raise BackendError(f"export needs {error.name}: pip install 'fastdiff[onnx]'") from error
    how = Options(
        DTYPES[options.dtype], options.target, options.opset, options.external_data, options.per_layer, options.parity,
        tuple(options.size) if options.size and options.fuse_sampler is None else None,
    )  # fmt: skip
    _check(options)
    manifest = _other_part(options, how) if options.part != "unet" else _unet(options, how)
    report = {"file": str(options.out), "kind": manifest.kind, "inputs": manifest.inputs, "outputs": manifest.outputs,
              "files": sorted(manifest.files), "parity": manifest.parity, "ranges": manifest.ranges}  # fmt: skip
    show(options, report, "\n".join(_lines(options, manifest)))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that belong to others."""
    for name in ("sampler", "guidance_scale"):
        if getattr(options, name) is not None and options.fuse_sampler is None:
            raise PlanError(f"--{name.replace('_', '-')} belongs to --fuse-sampler N")
    for name in ("split", "control", "adapters"):
        if getattr(options, name) and options.fuse_sampler is not None:
            raise PlanError(f"--{name} does not go with --fuse-sampler: a fused sampler is one graph")
    if options.part != "unet":
        given = [
            name for name in ("fuse_sampler", "split", "control", "adapters", "lora", "size") if getattr(options, name)
        ]
        if given:
            raise PlanError(f"--{given[0].replace('_', '-')} is for --part unet, not {options.part}")


def _unet(options: argparse.Namespace, how: Any) -> Any:
    from fastdiff.export.onnx import export_sampler, export_unet

    model, trained = source(resolve(options.model))
    if options.lora:
        loras = LoraSet({"unet": model.network})
        for file in options.lora:
            loras.load(str(file), read_lora(file))
        loras.set(dict.fromkeys(map(str, options.lora), 1.0))
        model = Model(model.network, model.info)  # no longer the weights of its folder
    if options.fuse_sampler is None:
        return export_unet(
            model,
            options.out,
            split=options.split,
            control=options.control,
            adapters=options.adapters,
            trained=trained,
            options=how,
        )
    size = tuple(options.size) if options.size else None
    return export_sampler(
        model, options.out, options.fuse_sampler, options.sampler, options.guidance_scale, size=size,  # type: ignore[arg-type]
        trained=trained, options=how,
    )  # fmt: skip


def _other_part(options: argparse.Namespace, how: Any) -> Any:
    from fastdiff.export.parts import export_controlnet, export_decoder

    root = resolve(options.model)
    if options.part.startswith("text-encoder"):
        return _text_encoder(root, options, how)
    if options.part == "decoder":
        folder = inside(root, "vae") if (root / INDEX).exists() else root
        return export_decoder(load_autoencoder(folder), options.out, options=how)
    return export_controlnet(load_controlnet(root, DTYPES["float32"]), options.out, options=how)


def _text_encoder(root: Path, options: argparse.Namespace, how: Any) -> Any:
    from fastdiff.export.text import export_text_encoder

    encoders = load_text_encoders(root, read_index(root), DTYPES["float32"])
    at = PARTS.index(options.part) - PARTS.index("text-encoder")
    if at >= len(encoders):
        raise PlanError(f"--part is {options.part}; this model has {len(encoders)} text encoder")
    reads = UNetConfig.from_dict(read_json(inside(root, "unet/config.json")))
    penultimate = reads.addition_embed_type is not None  # as SDXL reads its encoders
    return export_text_encoder(encoders[at], options.out, penultimate=penultimate, options=how)


def source(folder: Path) -> tuple[Model, Any]:
    """Load the UNet of a folder, with what it was trained on where its own names do not say it.

    Raises:
        ArtifactError: if the folder is none that can be read.
    """
    if (folder / MANIFEST).exists():
        return load_model(folder), None
    if not (folder / INDEX).exists():
        return Model(
            load_unet(folder, channels_last=False), ModelInfo(path="scaled_linear", prediction="eps"), folder
        ), None
    network = load_unet(inside(folder, "unet"), channels_last=False)
    config = network.config
    alone = not config.conditional or config.time_cond_proj_dim
    strength = 1.0 if alone else usual_strength(config.addition_embed_type is not None)
    trained = from_diffusers_scheduler(inside(folder, "scheduler")).trained()
    return Model(network, ModelInfo(guidance_scale=strength), folder / "unet"), trained


def _lines(options: argparse.Namespace, manifest: Any) -> list[str]:
    """A report to read."""
    names = ", ".join([str(options.out), *sorted(manifest.files)])
    lines = [f"{names}: {manifest.kind} for {manifest.target}, opset {manifest.opset}, {manifest.dtype}"]
    cases = {name: error for name, error in manifest.parity.items() if name != "layers"}
    lines += [f"  {name}: relative error {error['exported']:.1e} (torch {manifest.dtype}: {error['torch']:.1e})"
              for name, error in cases.items()]  # fmt: skip
    if not cases:
        why = "onnxruntime's CPU provider does not compute in it" if manifest.dtype == "bfloat16" else "not asked for"
        lines.append(f"  checked, error not measured: {why}")
    kept = manifest.ranges.get("kept_in_float32", {})
    return lines + [f"  in float32: {layer} (reaches {largest})" for layer, largest in kept.items()]
