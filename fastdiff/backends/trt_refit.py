"""New weights in an engine that was built for it: a LoRA or a trained checkpoint, without a build."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.artifact import load_manifest
from fastdiff.backends.trt import DTYPES, Engine
from fastdiff.backends.trt_library import TITLES
from fastdiff.errors import ArtifactError, BackendError, ShapeError


def refit_from_graph(engine: Engine, graph: Path) -> None:
    """Give an engine the weights of another export of the same network.

    Args:
        engine: built with ``refit``.
        graph: an ONNX file that ``fastdiff export`` wrote; its manifest is checked.

    Raises:
        ArtifactError: if the engine cannot be changed, or the graph is damaged or another one.
        BackendError: if the library refuses.
    """
    load_manifest(graph)
    refitter = _refitter(engine)
    parser = engine.library.module.OnnxParserRefitter(refitter, engine.logger)
    if not parser.refit_from_file(str(graph)):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ArtifactError(f"{graph}: does not fit the engine: {said[0] if said else engine.logger.said()}")
    _finish(engine, refitter)


def refit_weights(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """Change single weights of an engine.

    Args:
        engine: built with ``refit``.
        tensors: by the names the graph gives them, each as large as what it replaces; on the CPU or the GPU.

    Raises:
        ArtifactError: if the engine cannot be changed, or has no weight of a name.
        ShapeError: if a tensor has another size.
        BackendError: if the library refuses, or wants more weights changed along.
    """
    refitter, module = _refitter(engine), engine.library.module
    known = set(refitter.get_all_weights())
    kept = []
    for name, tensor in tensors.items():
        if name not in known:
            raise ArtifactError(f"the engine has no weight {name!r} that can be changed; it has {len(known)} others")
        wanted = refitter.get_weights_prototype(name)
        if wanted.size != tensor.numel():
            raise ShapeError(f"weight {name!r} has {tensor.numel()} numbers; the engine's has {wanted.size}")
        ready = tensor.detach().to(DTYPES[wanted.dtype.name]).contiguous()
        kept.append(ready)  # the library reads it in _finish
        where = module.TensorLocation.DEVICE if ready.is_cuda else module.TensorLocation.HOST
        weights = module.Weights(wanted.dtype, ready.data_ptr(), ready.numel())
        if not refitter.set_named_weights(name, weights, where):
            raise BackendError(f"weight {name!r} is refused: {engine.logger.said()}")
    _finish(engine, refitter)


def _refitter(engine: Engine) -> Any:
    if not engine.manifest.refit:
        raise ArtifactError("this engine was built without refit, so its weights are fixed: build it with refit")
    return engine.library.module.Refitter(engine.engine, engine.logger)


def _finish(engine: Engine, refitter: Any) -> None:
    missing = list(refitter.get_missing_weights())
    if missing:
        raise BackendError(f"weights that belong together must change together; missing: {', '.join(missing[:5])}")
    with ExitStack() as held:  # nothing is started meanwhile; what runs already is waited for
        held.enter_context(engine.lock)
        for context in engine.contexts.values():
            held.enter_context(context.lock)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        if not refitter.refit_cuda_engine():
            raise BackendError(f"{TITLES[engine.library.name]} did not take the weights: {engine.logger.said()}")
