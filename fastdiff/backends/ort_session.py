"""Sessions of onnxruntime: opened only where they run as asked, and run without copies where tensors are on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.onnx_files import check_external_data
from fastdiff.errors import ArtifactError, BackendError, ShapeError
from fastdiff.models.files import one_line

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime; pip install onnxruntime-gpu (they share one name: only one may be installed)"
# ONNX's names and numbers of types
_TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
}


def open_session(
    file: Path,
    device: torch.device,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    graphs: bool = False,
    lean: bool = False,
) -> Any:
    """Open an ONNX file with onnxruntime.

    Args:
        file: its weights may lie in plain files beside it, nowhere else.
        device: the CPU or a GPU.
        threads: for one operator; as many as torch uses unless given.
        sizes: numbers for sizes that the graph leaves free (``{"batch": 1}``); it then takes no other.
        graphs: on a GPU, replay the whole graph as one CUDA graph.
        lean: keep no second copy of the weights, laid out for speed.

    Raises:
        ArtifactError: if the file is damaged, or its weights lie elsewhere.
        BackendError: if onnxruntime is missing, or did not load the provider the device needs (it would otherwise
            fall back to the CPU without a word).
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("backend 'onnxruntime' is not installed: pip install 'fastdiff[onnx]'") from error
    check_external_data(file)
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"backend 'onnxruntime' runs on 'cpu' or 'cuda'; device is {str(device)!r}")
    provider = CUDA if device.type == "cuda" else CPU
    if provider not in onnxruntime.get_available_providers():
        raise BackendError(
            f"this onnxruntime has no {provider}, only {onnxruntime.get_available_providers()}: {INSTALL}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of every constant that it cannot fold
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    chosen: Any = provider
    if provider == CUDA:
        onnxruntime.preload_dlls()  # finds the copies of CUDA and cuDNN that came with torch
        # torch's own stream, so that neither library waits for the other
        stream = torch.cuda.current_stream(device).cuda_stream
        settings = {"device_id": device.index or 0, "user_compute_stream": str(stream)}
        chosen = (provider, settings | ({"enable_cuda_graph": "1"} if graphs else {}))
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[chosen])
    except Exception as error:  # onnxruntime's own kinds, none of them public
        raise ArtifactError(f"{file}: onnxruntime does not take it ({one_line(error, 300)})") from error
    if session.get_providers()[0] != provider:
        raise BackendError(f"onnxruntime loaded {session.get_providers()} instead of {provider}: {INSTALL}")
    return session


class Runner:
    """A session as a function of torch tensors.

    Args:
        session: of ``open_session``.
        device: where its inputs and outputs are. On a GPU they stay there: both are bound by address.
        graphs: was it opened for CUDA graphs? Then every shape gets buffers of its own, which inputs are copied to.
    """

    def __init__(self, session: Any, device: torch.device, graphs: bool = False):
        self.session, self.device, self.graphs = session, device, graphs
        self.inputs = {entry.name: entry for entry in session.get_inputs()}
        self.outputs = {entry.name: entry for entry in session.get_outputs()}
        self.usual: dict[str, Tensor] = {}  # inputs that are taken where none is given
        self._buffers: dict[Any, tuple[int, dict[str, Tensor], dict[str, Tensor]]] = {}

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it; inputs that it does not have are left out.

        Raises:
            ShapeError: naming an input that is missing.
        """
        feed = {}
        for name, entry in self.inputs.items():
            value = given.get(name, self.usual.get(name))
            if value is None:
                raise ShapeError(f"the exported graph needs {name}, {entry.shape}; given: {', '.join(given)}")
            feed[name] = value.to(self.device, _TYPES[entry.type][0]).contiguous()
        if self.device.type == "cpu":
            results = self.session.run(list(self.outputs), {name: value.numpy() for name, value in feed.items()})
            return {name: torch.from_numpy(value) for name, value in zip(self.outputs, results, strict=True)}
        return self._replayed(feed) if self.graphs else self._bound(feed, self._empty(feed), None)

    def _empty(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory for the outputs, whose sizes are numbers, names of sizes of the inputs, or ``8*name``."""
        known = {
            name: size
            for entry in self.inputs.values()
            for name, size in zip(entry.shape, feed[entry.name].shape, strict=True)
            if isinstance(name, str)
        }
        return {
            name: torch.empty(
                [size if isinstance(size, int) else _times(size, known) for size in entry.shape],
                dtype=_TYPES[entry.type][0], device=self.device,
            )
            for name, entry in self.outputs.items()
        }  # fmt: skip

    def _bound(self, feed: Mapping[str, Tensor], results: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
        binding = self.session.io_binding()
        place = self.device.type, self.device.index or 0
        for bind, values, entries in (
            (binding.bind_input, feed, self.inputs), (binding.bind_output, results, self.outputs),
        ):  # fmt: skip
            for name, value in values.items():
                bind(name, *place, _TYPES[entries[name].type][1], list(value.shape), value.data_ptr())
        self.session.run_with_iobinding(binding, options)
        return results

    def _replayed(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A CUDA graph reads and writes the addresses that it was captured with."""
        import onnxruntime

        key = tuple(tuple(value.shape) for value in feed.values())
        if key not in self._buffers:
            self._buffers[key] = (
                len(self._buffers) + 1,
                {n: torch.empty_like(v) for n, v in feed.items()},
                self._empty(feed),
            )
        number, inputs, results = self._buffers[key]
        for name, value in feed.items():
            inputs[name].copy_(value)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        self._bound(inputs, results, options)
        return {name: value.clone() for name, value in results.items()}


def _times(size: str, known: Mapping[str, int]) -> int:
    """A size as exported graphs write it: a name, or a multiple of one."""
    factor, _, name = size.rpartition("*")
    return int(factor or 1) * known[name]
