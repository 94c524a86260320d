"""The UNet as a plan of fused ops on a CPU (``fastdiff.kernels.native``), chosen layer by layer by measurement."""

from __future__ import annotations

import torch

from fastdiff.backends.eager import UNetNetwork
from fastdiff.backends.native.trunk import NativeNetwork, NativeTrunk
from fastdiff.errors import BackendError
from fastdiff.kernels.native import Unavailable
from fastdiff.models.unet import UNet

IN_TORCH = ("auto", "eager", "native")


def network_of(unet: UNet, backend: str = "auto") -> UNetNetwork:
    """A UNet in one of the backends that run it as it lies in memory.

    Args:
        unet: on its device, channels-last.
        backend: ``"eager"``: plain torch, on a GPU with the Triton kernels; ``"native"``: the CPU runtime; ``"auto"``:
            the CPU runtime where it can run and is not slower, else ``"eager"``.

    Raises:
        BackendError: if there is no such backend, or ``"native"`` cannot run here.
    """
    if backend not in IN_TORCH:
        raise BackendError(f"backend is {backend!r}; allowed for this model: {', '.join(IN_TORCH)}")
    weight = unet.conv_in.weight
    suits = weight.device.type == "cpu" and weight.dtype == torch.float32
    if backend == "native" and not suits:
        raise BackendError(f"backend 'native' runs float32 on a CPU; this is {weight.dtype} on {weight.device}")
    if backend != "eager" and suits:
        try:
            return NativeNetwork(unet, never_slower=backend == "auto")
        except Unavailable as why:
            if backend == "native":
                raise BackendError(f"backend 'native' cannot run here: {why}") from why
    return UNetNetwork(unet)


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


__all__ = ["IN_TORCH", "NativeNetwork", "NativeTrunk", "explain", "network_of"]
