"""The UNet as a plan of fused ops on a CPU (``fastdiff.kernels.native``), chosen layer by layer by measurement."""

from __future__ import annotations

from fastdiff.backends.base import Spec
from fastdiff.backends.eager import UNetNetwork, place
from fastdiff.backends.native.trunk import NativeNetwork, NativeTrunk
from fastdiff.errors import BackendError
from fastdiff.kernels.native import Unavailable
from fastdiff.models.unet import UNet
from fastdiff.models.weights import Model


def load(model: Model, spec: Spec) -> NativeNetwork:
    """Load into the CPU runtime.

    Raises:
        BackendError: if the device or type is not its own, or it cannot be had here (see ``NativeTrunk``).
    """
    if spec.device.type != "cpu" or spec.dtype.itemsize != 4:
        raise BackendError(f"backend 'native' runs float32 on a CPU; asked for {spec.dtype} on {spec.device}")
    try:
        return NativeNetwork(place(model, spec))
    except Unavailable as why:
        raise BackendError(f"backend 'native' cannot run here: {why}") from why


def fastest(unet: UNet) -> UNetNetwork:
    """The plan where it can run and is not slower than plain torch, else plain torch; on a GPU, torch with kernels."""
    weight = unet.conv_in.weight
    if weight.device.type == "cpu" and str(weight.dtype) == "torch.float32":
        try:
            return NativeNetwork(unet, never_slower=True)
        except Unavailable:
            pass
    return UNetNetwork(unet)


__all__ = ["NativeNetwork", "NativeTrunk", "fastest", "load"]
