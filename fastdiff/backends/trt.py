"""TensorRT and TensorRT for RTX, behind the same loop as every other backend: tensors stay on the GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.backends.base import Spec
from fastdiff.backends.ort import SplitNetwork, WholeNetwork
from fastdiff.backends.plan_files import PlanManifest, joined, load_manifest, read_plan, read_sealed, write_sealed
from fastdiff.backends.trt_library import RTX_ARCHITECTURES, TITLES, Library, find_library, make_logger
from fastdiff.errors import ArtifactError, BackendError, ShapeError
from fastdiff.kernels.native import Unavailable, cache_folder
from fastdiff.models.weights import Model, fingerprint

FILE = "unet.plan"
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64,
          "INT32": torch.int32, "BOOL": torch.bool}  # fmt: skip


class Context(NamedTuple):
    """An execution context of one stream and one profile; one thread at a time may fill it."""

    context: Any
    lock: threading.Lock


class Engine:
    """A deserialised engine.

    Any number of threads may call it: each CUDA stream has contexts of its own, and what a stream was given runs in
    order, so a context is filled again only behind its last run.

    Args:
        library: that made the plan.
        engine: its ``ICudaEngine``.
        manifest: of the plan.
        device: where tensors lie.
        logger: what the library logs to.
        stream: gives the handle of the stream to run on; by default torch's current one.
        kernels: file for what TensorRT for RTX compiles as it runs; None: not kept.
        runtime: what deserialised the engine; it must outlive it.
    """

    def __init__(
        self,
        library: Library,
        engine: Any,
        manifest: PlanManifest,
        device: torch.device,
        logger: Any,
        stream: Callable[[], int] | None = None,
        kernels: Path | None = None,
        runtime: Any = None,
    ):
        self.library, self.engine, self.manifest, self.device, self.logger = library, engine, manifest, device, logger
        self.stream = stream or (lambda: int(torch.cuda.current_stream(device).cuda_stream))
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        self.contexts: dict[tuple[int, int], Context] = {}
        self.lock = threading.Lock()
        self.kernels, self.runtime = kernels, runtime
        self.config, self.runtime_cache = self._runtime_config()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once: inputs by name, on the device -> new output tensors, which the stream will have filled.

        Inputs that the engine does not have are left out.

        Raises:
            ShapeError: if no profile holds the shapes, or an input is missing or on another device.
            BackendError: if the library refuses to run.
        """
        ready = {name: self._ready(name, inputs) for name in self.inputs}
        stream, profile = self.stream(), self._profile(ready)
        held, fresh = self._context(stream, profile)
        with held.lock:
            outputs = self._run(held.context, ready, stream)
        if fresh:
            self._keep_kernels()
        return outputs

    def _run(self, context: Any, inputs: Mapping[str, Tensor], stream: int) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name, (dtype, _) in self.manifest.outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=DTYPES[dtype], device=self.device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(stream):
            raise BackendError(f"{TITLES[self.library.name]} did not run: {self.logger.said()}")
        return outputs

    def _ready(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if name not in inputs:
            raise ShapeError(f"input {name!r} is missing; needed: {', '.join(self.manifest.inputs)}")
        tensor = inputs[name]
        if tensor.device.type != self.device.type:
            raise ShapeError(f"input {name!r} lies on {tensor.device}; needed: {self.device}")
        return tensor.to(DTYPES[self.manifest.inputs[name][0]]).contiguous()

    def _profile(self, inputs: Mapping[str, Tensor]) -> int:
        """Return the first profile that holds all shapes."""
        for number, shapes in enumerate(self.manifest.profiles):
            if all(_between(tuple(tensor.shape), *shapes[name]) for name, tensor in inputs.items()):
                return number
        given = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        allowed = "; or ".join(
            ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in shapes.items())
            for shapes in self.manifest.profiles
        )
        raise ShapeError(f"inputs are {given}; this engine was built for {allowed}")

    def _context(self, stream: int, profile: int) -> tuple[Context, bool]:
        with self.lock:
            if (stream, profile) in self.contexts:
                return self.contexts[stream, profile], False
            made = self.engine.create_execution_context(*([] if self.config is None else [self.config]))
            if made is None or not made.set_optimization_profile_async(profile, stream):
                raise BackendError(f"{TITLES[self.library.name]} gives no context: {self.logger.said()}")
            self.contexts[stream, profile] = Context(made, threading.Lock())
            return self.contexts[stream, profile], True

    def _runtime_config(self) -> tuple[Any, Any]:
        if not self.library.rtx:
            return None, None
        config = self.engine.create_runtime_config()
        cache = config.create_runtime_cache()
        known = None if self.kernels is None else read_sealed(self.kernels)
        if known is not None:
            cache.deserialize(known)  # one that does not fit this GPU or driver is left out by the library
        config.set_runtime_cache(cache)
        return config, cache

    def _keep_kernels(self) -> None:
        if self.kernels is not None and self.runtime_cache is not None:
            write_sealed(self.kernels, bytes(memoryview(self.runtime_cache.serialize())))


def _between(shape: tuple[int, ...], low: list[int], _: list[int], high: list[int]) -> bool:
    return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def load_engine(
    file: Path, device: torch.device, trusted: Collection[str] = (), library: Library | None = None
) -> Engine:
    """Read a plan, check it, and hand it to the library that made it.

    Args:
        file: the plan, its manifest beside it.
        device: a GPU.
        trusted: SHA-256 of manifests of plans that were made elsewhere; see ``read_plan``.
        library: who runs it; None: the one that made it.

    Raises:
        ArtifactError: if the plan is foreign, stale, altered, or for another GPU.
        BackendError: if there is no GPU, the library is missing, or it refuses the plan.
    """
    library = library or find_library(load_manifest(file).library)
    plan, manifest = read_plan(file, library=library.name, version=library.version, trusted=trusted)
    here = architecture_of(device)
    check_architecture(file, manifest, here)
    logger = make_logger(library)
    runtime = library.module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"{file}: {TITLES[library.name]} refuses it: {logger.said()}")
    kernels = _kernels(manifest, here)
    return Engine(library, engine, manifest, device, logger, kernels=kernels, runtime=runtime)


def architecture_of(device: torch.device) -> str:
    """Return the name of a GPU's architecture, such as ``"sm86"``.

    Raises:
        BackendError: if it is no GPU, or there is none.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        here = f"device is {device.type!r}" if device.type != "cuda" else "torch sees no GPU here"
        raise BackendError(f"an engine runs on an NVIDIA GPU; {here}: use backend 'onnxruntime'")
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def check_architecture(file: Path, manifest: PlanManifest, here: str) -> None:
    """Refuse a plan for other GPUs.

    Raises:
        BackendError: if TensorRT for RTX serves no such GPU at all.
        ArtifactError: if the plan was built for others.
    """
    if manifest.library == "tensorrt_rtx" and here not in RTX_ARCHITECTURES:
        raise BackendError(
            f"this GPU is {here}; TensorRT for RTX serves {', '.join(RTX_ARCHITECTURES)}: pip install "
            "'fastdiff[tensorrt]', or use backend 'onnxruntime'"
        )
    if here not in manifest.architectures:
        raise ArtifactError(f"{file}: was built for {', '.join(manifest.architectures)}; this GPU is {here}")


def _kernels(manifest: PlanManifest, architecture: str) -> Path | None:
    try:
        return cache_folder() / f"kernels-{manifest.sha256[:32]}-{architecture}"
    except Unavailable:
        return None


def load_network(
    file: Path, device: torch.device, model_sha256: str | None = None, trusted: Collection[str] = ()
) -> WholeNetwork | SplitNetwork:
    """Load the engine of a UNet, and the one beside it (``<stem>.prepare.plan``) that runs once, if it has one.

    Args:
        file: the plan.
        device: a GPU.
        model_sha256: ``fingerprint`` of the weights that it must have been made from; None: not checked.
        trusted: see ``read_plan``.

    Raises:
        ArtifactError: if a plan is missing, foreign, damaged, a fused sampler, of other weights or of another export.
        BackendError: if it cannot run here.
    """
    if not file.exists():
        raise ArtifactError(f"{file}: no such file; fastdiff build --engine makes engines: give one as artifact")
    graph = load_manifest(file).graph
    if graph.get("kind") not in ("unet", "step"):
        raise ArtifactError(f"{file}: holds a {graph.get('kind')}; the engine of a 'unet' export is needed here")
    if model_sha256 is not None and graph.get("model_sha256") != model_sha256:
        raise ArtifactError(f"{file}: was made from other weights; build it again")
    step: Any = load_engine(file, device, trusted)
    if graph["kind"] == "unet":
        return WholeNetwork(step)
    beside = file.with_name(f"{file.stem}.prepare{file.suffix}")
    check_pair(beside, load_manifest(beside), step.manifest)
    once: Any = load_engine(beside, device, trusted)
    return SplitNetwork(once, step)


def check_pair(file: Path, once: PlanManifest, step: PlanManifest) -> None:
    """Refuse an engine whose graph was not exported together with that of the step.

    Raises:
        ArtifactError: naming it.
    """
    files = dict(step.graph.get("files", {}))
    name = f"{file.stem}.onnx"
    hashes = [files[each] for each in (name, f"{name}.data") if each in files]
    if not hashes or once.graph_sha256 != joined(hashes):
        raise ArtifactError(f"{file}: belongs to another export than the engine beside it; build both again")


def load(model: Model, spec: Spec) -> WholeNetwork | SplitNetwork:
    """Load the engine of a model.

    Raises:
        ArtifactError: if the plan is missing, or as ``load_network``.
        BackendError: if it cannot run here.
    """
    if model.folder is None:
        raise ArtifactError("backend 'tensorrt' needs a model that was loaded from a folder")
    return load_network(spec.artifact or model.folder / FILE, spec.device, fingerprint(model.folder))
