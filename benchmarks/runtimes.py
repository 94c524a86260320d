"""One diffusers UNet in every runtime that people use on CPUs, as callables of the same inputs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.backends.in_memory import network_of
from fastdiff.models.config import UNetConfig
from fastdiff.models.unet import UNet
from fastdiff.sampling.denoiser import Cond

Inputs = dict[str, Tensor]  # sample, timestep, and encoder_hidden_states or class_labels where the network reads them
Evaluate = Callable[[Tensor, Tensor], Tensor]  # (sample, timestep) -> the network's output


class Plain(nn.Module):
    """Tensors in, one tensor out."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: Tensor) -> Tensor:
        """``values`` in the order of ``names``."""
        result: Tensor = self.network(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]
        return result


def diffusers(network: nn.Module, inputs: Inputs, folder: Path) -> Evaluate:
    """The module as it is."""
    rest = others(inputs)
    return lambda sample, timestep: network(sample, timestep, **rest, return_dict=False)[0]


def channels_last(network: nn.Module, inputs: Inputs, folder: Path) -> Evaluate:
    """The module in torch's other memory format."""
    run = diffusers(copy.deepcopy(network).to(memory_format=torch.channels_last), inputs, folder)
    return lambda sample, timestep: run(sample.contiguous(memory_format=torch.channels_last), timestep)


def compiled(network: nn.Module, inputs: Inputs, folder: Path) -> Evaluate:
    """``torch.compile`` as it comes."""
    run = torch.compile(Plain(copy.deepcopy(network), tuple(inputs)), dynamic=False)
    rest = tuple(others(inputs).values())
    return lambda sample, timestep: run(sample, timestep, *rest)


def compiled_frozen(network: nn.Module, inputs: Inputs, folder: Path) -> Evaluate:
    """``torch.compile`` with inductor's freezing, which lays weights out beforehand."""
    from torch._inductor import config

    run = compiled(network, inputs, folder)
    with config.patch(freezing=True):  # read when it compiles, at the first call
        run(inputs["sample"], inputs["timestep"])
    return run


def exported(network: nn.Module, inputs: Inputs, folder: Path) -> Path:
    """The network as an ONNX file for these shapes."""
    file = folder / f"unet-{len(inputs['sample'])}.onnx"
    if not file.exists():
        with quiet():
            torch.onnx.export(
                Plain(network, tuple(inputs)), tuple(inputs.values()), str(file), dynamo=True, external_data=True,
                input_names=list(inputs), verbose=False,
            )  # fmt: skip
    return file


def onnxruntime(network: nn.Module, inputs: Inputs, folder: Path) -> Evaluate:
    """Onnxruntime's CPU provider with as many threads as torch."""
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    file = exported(network, inputs, folder)
    session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    rest = {name: value.numpy() for name, value in others(inputs).items()}

    def run(sample: Tensor, timestep: Tensor) -> Tensor:
        feed = {"sample": sample.numpy(), "timestep": timestep.numpy()} | rest
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def openvino(network: nn.Module, inputs: Inputs, folder: Path) -> Evaluate:
    """OpenVINO's CPU plugin, for latency, in float32, with as many threads as torch."""
    from openvino import Core

    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }  # fmt: skip
    model = Core().compile_model(str(exported(network, inputs, folder)), "CPU", settings)
    request, names = model.create_infer_request(), [port.any_name for port in model.inputs]
    rest = {name: value.numpy() for name, value in others(inputs).items()}

    def run(sample: Tensor, timestep: Tensor) -> Tensor:
        feed = {"sample": sample.numpy(), "timestep": timestep.numpy()} | rest
        return torch.from_numpy(request.infer([feed[name] for name in names])[0].copy())

    return run


def ours(network: nn.Module, inputs: Inputs, folder: Path) -> Evaluate:
    """The project's network with the weights of diffusers', shared where the layout allows."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict({"_class_name": type(network).__name__} | dict(network.config)))
    unet.load_state_dict(network.state_dict(), assign=True)  # the machine has to hold every runtime's at once
    return as_the_loop_calls(unet, inputs)


def as_the_loop_calls(unet: UNet, inputs: Inputs) -> Evaluate:
    """The project's network: text and times are prepared once for a run, not at every step."""
    run = network_of(unet.to(memory_format=torch.channels_last).eval().requires_grad_(False))
    batch, rest = len(inputs["sample"]), others(inputs)
    cond = Cond(rest.pop("class_labels", None), rest or None)
    index = torch.zeros(batch, dtype=torch.int64)
    prepared: dict[float, Any] = {}

    def evaluate(sample: Tensor, timestep: Tensor) -> Tensor:
        time = float(timestep)
        if time not in prepared:
            prepared[time] = run.prepare(cond, torch.full((1, 1, 2), time))
        return run(sample, index, prepared[time])

    return evaluate


RUNTIMES: dict[str, Callable[[nn.Module, Inputs, Path], Evaluate]] = {
    "diffusers": diffusers,
    "channels-last": channels_last,
    "compile": compiled,
    "compile-freezing": compiled_frozen,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "fastdiff": ours,
}


def others(inputs: Inputs) -> Inputs:
    """What stays the same from step to step."""
    return {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}


def installed(name: str) -> bool:
    """Is the library of a runtime here?"""
    return name not in ("onnxruntime", "openvino") or importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's running commentary."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
