"""Backends by name. Each loader imports its library itself, so that naming one costs nothing."""

from __future__ import annotations

from fastdiff.backends.base import Backend, Spec
from fastdiff.errors import BackendError
from fastdiff.models.weights import Model
from fastdiff.sampling.denoiser import Network


def _compiled(model: Model, spec: Spec) -> Network:
    from fastdiff.backends.eager import load_compiled

    return load_compiled(model, spec)


def _onnxruntime(model: Model, spec: Spec) -> Network:
    from fastdiff.backends.ort import load

    return load(model, spec)


def _tensorrt(model: Model, spec: Spec) -> Network:
    from fastdiff.backends.trt import load

    return load(model, spec)


def _in_memory(name: str) -> Backend:
    def load(model: Model, spec: Spec) -> Network:
        from fastdiff.backends.eager import place
        from fastdiff.backends.in_memory import network_of

        return network_of(place(model, spec), name)

    return load


BACKENDS: dict[str, Backend] = {
    "auto": _in_memory("auto"),
    "eager": _in_memory("eager"),
    "native": _in_memory("native"),
    "captured": _in_memory("captured"),
    "captured_loop": _in_memory("captured_loop"),
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
}


def load_backend(name: str, model: Model, spec: Spec) -> Network:
    """Load a model into a backend.

    Raises:
        BackendError: if there is no such backend, or it cannot run here.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; allowed: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name](model, spec)


__all__ = ["BACKENDS", "Backend", "Spec", "load_backend"]
