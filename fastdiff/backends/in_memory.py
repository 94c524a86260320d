"""A UNet in memory, in one of the backends that run it as it lies there."""

from __future__ import annotations

import torch

from fastdiff.backends.eager import UNetNetwork
from fastdiff.backends.flat import FlatNetwork, LoopNetwork
from fastdiff.backends.native import NativeNetwork, NativeTrunk
from fastdiff.errors import BackendError
from fastdiff.kernels.native import Unavailable
from fastdiff.models.unet import UNet
from fastdiff.sampling import loop
from fastdiff.sampling.denoiser import Network
from fastdiff.sampling.run import Walk

IN_MEMORY = ("auto", "eager", "native", "captured", "captured_loop")


def network_of(unet: UNet, backend: str = "auto", device: torch.device | None = None) -> UNetNetwork:
    """A UNet in one of the backends that run it as it lies in memory.

    Args:
        unet: on its device, channels-last.
        backend: ``"eager"``: plain torch, on a GPU with the Triton kernels; ``"native"``: the CPU runtime;
            ``"captured"``: a flat plan, on a GPU captured in a CUDA graph; ``"captured_loop"``: the whole loop in one
            graph, for the least latency where shapes and samplers seldom change; ``"auto"``: on a CPU its runtime, on a
            GPU the captured plan, where they can run and are not slower than ``"eager"``; else that.
        device: where it will run, if it is brought there only for that.

    Raises:
        BackendError: if there is no such backend, or ``"native"`` cannot run here.
    """
    if backend not in IN_MEMORY:
        raise BackendError(f"backend is {backend!r}; allowed for this model: {', '.join(IN_MEMORY)}")
    weight = unet.conv_in.weight
    place = device or weight.device
    suits = place.type == "cpu" and weight.dtype == torch.float32
    if backend == "native" and not suits:
        raise BackendError(f"backend 'native' runs float32 on a CPU; this is {weight.dtype} on {place}")
    if backend in ("auto", "native") and suits:
        try:
            return NativeNetwork(unet, never_slower=backend == "auto")
        except Unavailable as why:
            if backend == "native":
                raise BackendError(f"backend 'native' cannot run here: {why}") from why
    if backend == "captured" or (backend == "auto" and place.type == "cuda"):
        return FlatNetwork(unet, never_slower=backend == "auto")
    return LoopNetwork(unet) if backend == "captured_loop" else UNetNetwork(unet)


def walk_of(network: Network) -> Walk:
    """How to run a loop over a network from start to end: the network's own way, if it has one."""
    return network.walk if isinstance(network, LoopNetwork) else loop.sample


def explain(unet: UNet) -> dict[str, dict[str, str]]:
    """What ``"auto"`` does with a UNet on this CPU at its own size: each kind of layer, and what it runs with.

    Measures what has not been measured here yet.
    """
    try:
        trunk = NativeTrunk(unet.to(memory_format=torch.channels_last), never_slower=True)
    except Unavailable as why:
        return {"plain torch": {"all": str(why)}}
    config = unet.config
    size = config.sample_size or 64
    rows = unet.row_width()
    tokens = torch.zeros(1, 77, config.cross_attention_dim)
    with torch.no_grad():
        contexts = unet.contexts(tokens) if config.conditional else ()
        trunk(torch.zeros(1, config.in_channels, size, size), torch.zeros(1, rows), contexts)
    return trunk.chosen()
