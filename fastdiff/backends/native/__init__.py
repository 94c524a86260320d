"""The UNet as a plan of fused ops on a CPU (``fastdiff.kernels.native``), chosen layer by layer by measurement."""

from fastdiff.backends.native.trunk import NativeNetwork, NativeTrunk

__all__ = ["NativeNetwork", "NativeTrunk"]
